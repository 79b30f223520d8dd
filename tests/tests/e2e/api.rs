//! What bad input gets: one 4xx that names the field and the remedy, and nothing is created.

use tests::Host;

use crate::HostTest;

pub(crate) const TESTS: &[(&str, HostTest)] = &[
    (
        "bad_input_gets_one_clear_error_and_creates_nothing",
        bad_input,
    ),
    ("the_openapi_document_names_every_resource", openapi),
    ("events_tell_what_happened_in_order", events),
];

/// A request that is refused: body, status, code, field.
const REFUSED: &[(&str, u16, &str, &str)] = &[
    (r#"{"name":"x"}"#, 400, "invalid_field", "/image"),
    (
        r#"{"name":"x","image":"no-such-image"}"#,
        404,
        "image_not_found",
        "/image",
    ),
    (
        r#"{"name":"x","image":"busybox","isolation":"jail"}"#,
        400,
        "invalid_field",
        "/isolation",
    ),
    (
        r#"{"name":"x","image":"busybox","colour":"red"}"#,
        400,
        "unknown_field",
        "/colour",
    ),
    (
        r#"{"name":"X y","image":"busybox"}"#,
        400,
        "invalid_field",
        "/name",
    ),
    (
        r#"{"name":"x","image":"busybox","limits":{"cpu":{"cores":0}}}"#,
        400,
        "invalid_field",
        "/limits/cpu/cores",
    ),
    (
        r#"{"name":"x","image":"busybox","limits":{"memory":{"max":1000000000000000}}}"#,
        400,
        "invalid_field",
        "/limits/memory/max",
    ),
    (
        r#"{"name":"x","image":"busybox","limits":{"memory":{"most":1}}}"#,
        400,
        "unknown_field",
        "/limits/memory/most",
    ),
    (
        r#"{"name":"x","image":"busybox","network":{"ports":[{"host":0,"instance":80}]}}"#,
        400,
        "invalid_field",
        "/network/ports/0/host",
    ),
    (
        r#"{"name":"x","image":"busybox","mounts":[{"source":"/etc","target":"../up"}]}"#,
        400,
        "invalid_field",
        "/mounts/0/target",
    ),
];

fn bad_input(host: &Host) {
    for (body, status, code, field) in REFUSED {
        let answer = host.request("POST", "/v1/instances", Some(body));
        let problem = answer.json();
        assert_eq!(answer.status, *status, "{body}: {}", answer.body);
        assert_eq!(problem["code"], *code, "{body}: {}", answer.body);
        assert_eq!(problem["field"], *field, "{body}: {}", answer.body);
        let detail = problem["detail"].as_str().unwrap_or_default();
        assert!(!detail.is_empty(), "{body}: no detail");
        assert_eq!(
            host.request("GET", "/v1/instances/x", None).status,
            404,
            "{body} created it"
        );
    }
    let broken = host.request("POST", "/v1/instances", Some("{"));
    assert_eq!(broken.status, 400, "{}", broken.body);
    assert_eq!(host.request("GET", "/v1/nothing", None).status, 404);
    assert_eq!(host.request("DELETE", "/v1/host", None).status, 405);
}

fn openapi(host: &Host) {
    let document = host.request("GET", "/v1/openapi.json", None).json();
    let paths = document["paths"]
        .as_object()
        .expect("the document has paths");
    for path in [
        "/v1/host",
        "/v1/instances",
        "/v1/instances/{name}",
        "/v1/images",
        "/v1/events",
    ] {
        assert!(paths.contains_key(path), "{path} is not documented");
    }
}

fn events(host: &Host) {
    let name = "eventful";
    host.hostctl(&["run", "--rm", "--name", name, "busybox", "true"])
        .ok();
    let events = host
        .hostctl(&["events", "--since", "0", "--no-follow", "--json"])
        .ok();
    let kinds: Vec<String> = events
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|event| event["subject"] == name)
        .filter_map(|event| event["kind"].as_str().map(str::to_owned))
        .collect();
    let wanted = [
        "instance.created",
        "instance.running",
        "instance.stopped",
        "instance.removed",
    ];
    let mut rest = kinds.iter();
    for kind in wanted {
        assert!(
            rest.any(|found| found == kind),
            "{kind} is missing or out of order in {kinds:?}"
        );
    }
}
