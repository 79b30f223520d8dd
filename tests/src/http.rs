//! Plain HTTP/1.1 on the API's socket, by hand: the API is for clients that we did not write.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::host::Host;

/// An answer of the API.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("no JSON: {error}\n{}", self.body))
    }
}

impl Host {
    /// Sends `body`, if there is one, as JSON. HTTP/1.0, so that the body ends with the connection.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let mut stream = UnixStream::connect(self.socket()).expect("hostd listens");
        let body = body.unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nhost: hostd\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("hostd reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("hostd answers");
        let (head, body) = text.split_once("\r\n\r\n").expect("an answer has a head");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Answer {
            status: status.expect("an answer has a status"),
            body: body.to_owned(),
        }
    }
}
