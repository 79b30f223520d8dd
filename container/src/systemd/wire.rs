//! The wire format of D-Bus, as far as calls of systemd need it (D-Bus specification, "Type System" and
//! "Message Protocol").

/// A message larger than this is none of systemd's answers to what is asked here.
pub(super) const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// The fixed part of a message, which says how long the rest is.
pub(super) const FIXED_BYTES: usize = 16;

/// Everything here is little-endian, and so is whoever answers: it runs on the same processor.
const LITTLE_ENDIAN: u8 = b'l';

const METHOD_CALL: u8 = 1;

/// Codes of header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// What a message is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum MessageKind {
    Return,
    Error,
    Signal,
    /// A call, or what a later version of the protocol has.
    Other,
}

/// The value of a property of a unit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Value {
    Flag(bool),
    Large(u64),
    Number(u32),
    Signed(i32),
    Text(String),
    Bytes(Vec<u8>),
    Numbers(Vec<u32>),
    Texts(Vec<String>),
    Pairs(Vec<(String, String)>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Value::Flag(_) => "b",
            Value::Large(_) => "t",
            Value::Number(_) => "u",
            Value::Signed(_) => "i",
            Value::Text(_) => "s",
            Value::Bytes(_) => "ay",
            Value::Numbers(_) => "au",
            Value::Texts(_) => "as",
            Value::Pairs(_) => "a(ss)",
        }
    }
}

/// Values one after the other. What is aligned is so from the beginning of the message; a body begins at
/// a multiple of eight, and can be written by itself.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn number(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    /// A string, or the path of an object. It is shorter than a message may be.
    pub(super) fn text(&mut self, text: &str) {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, signature: &str) {
        self.0
            .push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements are aligned to `to`.
    pub(super) fn array(&mut self, to: usize, write: impl FnOnce(&mut Self)) {
        self.number(0);
        let length = self.0.len() - 4;
        self.align(to);
        let start = self.0.len();
        write(self);
        let bytes = u32::try_from(self.0.len() - start).unwrap_or(u32::MAX);
        self.0[length..length + 4].copy_from_slice(&bytes.to_le_bytes());
    }

    fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Flag(flag) => self.number(u32::from(*flag)),
            Value::Large(value) => {
                self.align(8);
                self.0.extend(value.to_le_bytes());
            }
            Value::Number(value) => self.number(*value),
            Value::Signed(value) => self.number(value.cast_unsigned()),
            Value::Text(text) => self.text(text),
            Value::Texts(texts) => self.array(4, |it| texts.iter().for_each(|text| it.text(text))),
            Value::Bytes(bytes) => self.array(1, |it| it.0.extend(bytes)),
            Value::Numbers(values) => {
                self.array(4, |it| values.iter().for_each(|value| it.number(*value)));
            }
            Value::Pairs(pairs) => self.array(8, |it| {
                for (one, other) in pairs {
                    it.align(8);
                    it.text(one);
                    it.text(other);
                }
            }),
        }
    }

    pub(super) fn flag(&mut self, flag: bool) {
        self.number(u32::from(flag));
    }

    /// `a(sv)`
    pub(super) fn properties<'a>(
        &mut self,
        properties: impl IntoIterator<Item = (&'a str, &'a Value)>,
    ) {
        self.array(8, |it| {
            for (name, value) in properties {
                it.align(8);
                it.text(name);
                it.variant(value);
            }
        });
    }

    fn field(&mut self, code: u8, kind: &str, text: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(kind);
        if kind == "g" {
            self.signature(text);
        } else {
            self.text(text);
        }
    }
}

/// A method, and what it is called with.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
    pub(super) signature: &'a str,
    pub(super) body: Writer,
}

impl Call<'_> {
    pub(super) fn encode(&self, destination: &str, serial: u32) -> Vec<u8> {
        let mut writer = Writer(vec![LITTLE_ENDIAN, METHOD_CALL, 0, 1]);
        writer.number(u32::try_from(self.body.0.len()).unwrap_or(u32::MAX));
        writer.number(serial);
        writer.array(8, |it| {
            it.field(PATH, "o", self.path);
            it.field(INTERFACE, "s", self.interface);
            it.field(MEMBER, "s", self.member);
            it.field(DESTINATION, "s", destination);
            if !self.signature.is_empty() {
                it.field(SIGNATURE, "g", self.signature);
            }
        });
        writer.align(8);
        writer.0.extend(&self.body.0);
        writer.0
    }
}

/// A message that was received.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Message {
    pub(super) kind: MessageKind,
    /// The serial of the call that is answered.
    pub(super) reply_to: Option<u32>,
    pub(super) error: Option<String>,
    pub(super) member: Option<String>,
    body: Vec<u8>,
}

/// The length of a whole message by its fixed part; nothing if that is malformed.
pub(super) fn length(fixed: &[u8; FIXED_BYTES]) -> Option<usize> {
    let mut reader = Reader::new(fixed);
    (reader.byte()? == LITTLE_ENDIAN).then_some(())?;
    reader.at = 4;
    let body = usize::try_from(reader.number()?).ok()?;
    reader.at = 12;
    let fields = usize::try_from(reader.number()?).ok()?;
    let header = FIXED_BYTES.checked_add(fields)?.next_multiple_of(8);
    header
        .checked_add(body)
        .filter(|length| *length <= MESSAGE_BYTES_MAX)
}

impl Message {
    /// Nothing if it is malformed.
    pub(super) fn decode(bytes: &[u8]) -> Option<Message> {
        let mut reader = Reader::new(bytes);
        reader.at = 1;
        let kind = match reader.byte()? {
            2 => MessageKind::Return,
            3 => MessageKind::Error,
            4 => MessageKind::Signal,
            _ => MessageKind::Other,
        };
        let mut message = Message {
            kind,
            reply_to: None,
            error: None,
            member: None,
            body: Vec::new(),
        };
        reader.at = 12;
        let end = FIXED_BYTES.checked_add(usize::try_from(reader.number()?).ok()?)?;
        while reader.at < end {
            reader.align(8);
            let code = reader.byte()?;
            // All fields that there are have one of these types.
            match reader.signature()? {
                "u" => {
                    let value = reader.number()?;
                    if code == REPLY_SERIAL {
                        message.reply_to = Some(value);
                    }
                }
                "g" => {
                    reader.signature()?;
                }
                "s" | "o" => {
                    let text = reader.text()?;
                    match code {
                        ERROR_NAME => message.error = Some(text.to_owned()),
                        MEMBER => message.member = Some(text.to_owned()),
                        _ => {}
                    }
                }
                _ => return None,
            }
        }
        message.body = bytes.get(end.next_multiple_of(8)..)?.to_vec();
        Some(message)
    }

    pub(super) fn body(&self) -> Reader<'_> {
        Reader::new(&self.body)
    }
}

/// Takes values from a message or its body.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub(super) fn number(&mut self) -> Option<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        bytes.try_into().ok().map(u32::from_le_bytes)
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.number()?).ok()?;
        let text = self.take(length)?;
        self.take(1)?;
        str::from_utf8(text).ok()
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = usize::from(self.byte()?);
        let text = self.take(length)?;
        self.take(1)?;
        str::from_utf8(text).ok()
    }

    /// A variant that holds a string.
    pub(super) fn variant_text(&mut self) -> Option<&'a str> {
        (self.signature()? == "s").then_some(())?;
        self.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_the_bytes_that_the_specification_wants() {
        let mut body = Writer::default();
        body.text("ab");
        body.properties([("x", &Value::Large(5))]);
        let call = Call {
            path: "/a",
            interface: "b.c",
            member: "D",
            signature: "sa(sv)",
            body,
        };
        let bytes = call.encode("e.f", 7);
        let expected: &[u8] = b"l\x01\0\x01\x28\0\0\0\x07\0\0\0\x4c\0\0\0\
            \x01\x01o\0\x02\0\0\0/a\0\0\0\0\0\0\
            \x02\x01s\0\x03\0\0\0b.c\0\0\0\0\0\
            \x03\x01s\0\x01\0\0\0D\0\0\0\0\0\0\0\
            \x06\x01s\0\x03\0\0\0e.f\0\0\0\0\0\
            \x08\x01g\0\x06sa(sv)\0\0\0\0\0\
            \x02\0\0\0ab\0\0\x18\0\0\0\0\0\0\0\
            \x01\0\0\0x\0\x01t\0\0\0\0\0\0\0\0\
            \x05\0\0\0\0\0\0\0";
        assert_eq!(bytes, expected, "{}", bytes.escape_ascii());
        let fixed: [u8; FIXED_BYTES] = bytes[..FIXED_BYTES].try_into().unwrap();
        assert_eq!(length(&fixed), Some(bytes.len()));
    }

    #[test]
    fn an_answer_is_read_and_a_cut_one_is_refused() {
        let bytes: &[u8] = b"l\x03\x01\x01\x07\0\0\0\x01\0\0\0\x1f\0\0\0\
            \x05\x01u\0\x09\0\0\0\x04\x01s\0\x01\0\0\0E\0\0\0\0\0\0\0\
            \x08\x01g\0\x01s\0\0\x02\0\0\0no\0";
        let message = Message::decode(bytes).unwrap();
        assert_eq!(message.kind, MessageKind::Error);
        assert_eq!(message.reply_to, Some(9));
        assert_eq!(message.error.as_deref(), Some("E"));
        assert_eq!(message.body().text(), Some("no"));
        for end in FIXED_BYTES..bytes.len() - 7 {
            assert_eq!(Message::decode(&bytes[..end]), None, "{end}");
        }
        let long = b"l\x02\0\x01\xff\xff\xff\xff\x01\0\0\0\xff\xff\xff\xff";
        assert_eq!(length(long), None);
    }
}
