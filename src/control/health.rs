//! `GET /v1/healthcheck`: what health checks know, as JSON, and as a page for a browser.

use std::fmt::Write;

use serde_json::Value;

use super::State;
use crate::admin::http::{Answer, Call};

/// All of them.
pub(super) fn all(state: &State, call: &Call) -> Answer {
    let checkers = checkers(state);
    match wants_page(call) {
        true => page(&checkers),
        // As APISIX, whose lists are maps when they are empty.
        false if checkers.is_empty() => Answer::json_text(200, "{}"),
        false => Answer::json(200, &Value::Array(checkers)),
    }
}

/// That of one resource.
pub(super) fn one(state: &State, call: &Call, kind: &str, id: &str) -> Answer {
    if !matches!(kind, "routes" | "services" | "upstreams") {
        return Answer::refuse(400, format!("invalid src type {kind}"));
    }
    let name = format!("/{kind}/{id}");
    let found = checkers(state)
        .into_iter()
        .find(|checker| checker.get("name").and_then(Value::as_str).is_some_and(|own| own.ends_with(&name)));
    match found {
        Some(checker) if wants_page(call) => page(&[checker]),
        Some(checker) => Answer::json(200, &checker),
        None => Answer::refuse(404, format!("{kind}[{id}] not found")),
    }
}

fn checkers(state: &State) -> Vec<Value> {
    state.health.as_ref().map_or_else(Vec::new, |health| health())
}

fn wants_page(call: &Call) -> bool {
    call.header("accept").is_some_and(|accept| accept.to_ascii_lowercase().contains("text/html"))
}

const COLUMNS: [&str; 9] = [
    "Index",
    "Upstream",
    "Check type",
    "Host",
    "Status",
    "Success counts",
    "TCP failures",
    "HTTP failures",
    "Timeout failures",
];

fn page(checkers: &[Value]) -> Answer {
    let mut rows = String::new();
    let mut index = 0;
    for checker in checkers {
        for node in checker.get("nodes").and_then(Value::as_array).into_iter().flatten() {
            index += 1;
            row(&mut rows, index, checker, node);
        }
    }
    let mut head = String::new();
    for column in COLUMNS {
        // Writing to a text cannot fail.
        let _ = write!(head, "<th>{column}</th>");
    }
    let title = "<title>Health checks</title>";
    let body = format!("<h1>Health checks</h1>\n<table border=\"1\">\n<tr>{head}</tr>\n{rows}</table>");
    let page = format!("<html>\n<head>{title}</head>\n<body>\n{body}\n</body>\n</html>\n");
    Answer::of_type(200, "text/html", page)
}

fn row(out: &mut String, index: usize, checker: &Value, node: &Value) {
    let count = |name: &str| text(node.pointer(&format!("/counter/{name}")));
    let cells = [
        index.to_string(),
        text(checker.get("name")),
        text(checker.get("type")),
        format!("{}:{}", text(node.get("ip")), text(node.get("port"))),
        text(node.get("status")),
        count("success"),
        count("tcp_failure"),
        count("http_failure"),
        count("timeout_failure"),
    ];
    out.push_str("<tr>");
    for cell in cells {
        let _ = write!(out, "<td>{cell}</td>");
    }
    out.push_str("</tr>\n");
}

/// A value as text that means nothing to a browser.
fn text(value: Option<&Value>) -> String {
    let text = match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_page_has_a_row_per_node_and_no_markup_of_others() {
        let counter = json!({"success": 1, "tcp_failure": 2, "http_failure": 3, "timeout_failure": 4});
        let node = json!({"ip": "127.0.0.1", "port": 80, "status": "healthy", "counter": counter});
        let checker = json!({"name": "/upstreams/<b>", "type": "http", "nodes": [node, {}]});
        let page = String::from_utf8(page(&[checker]).body.to_vec()).unwrap();
        let first = "<tr><td>1</td><td>/upstreams/&lt;b&gt;</td><td>http</td><td>127.0.0.1:80</td><td>healthy</td>\
                     <td>1</td><td>2</td><td>3</td><td>4</td></tr>";
        assert!(page.contains(first), "{page}");
        assert!(page.contains("<td>2</td>") && !page.contains("<b>"), "{page}");
    }
}
