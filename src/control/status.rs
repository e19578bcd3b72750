//! The status API (status-api.md): whether this gateway runs, and whether it has a configuration to serve by.

use std::{future::Future, rc::Rc};

use ::http::Method;
use serde_json::json;
use tokio::net::TcpListener;

use crate::admin::http::{self as api, Answer, Incomplete};

/// Whether every worker has a configuration.
pub type Ready = Box<dyn Fn() -> bool>;

/// Serves the status API on `listener` until `shutdown`. Must run inside a `LocalSet`.
pub async fn serve(listener: TcpListener, ready: Ready, shutdown: impl Future<Output = ()>) {
    let handler = move |request: Incomplete| std::future::ready(answer(&request, &ready));
    api::serve(listener, None, Rc::new(handler), shutdown).await;
}

fn answer(request: &Incomplete, ready: &Ready) -> Answer {
    let head = &request.head;
    if !matches!(head.method, Method::GET | Method::HEAD) {
        return Answer::refuse(404, "404 Route Not Found");
    }
    let ok = || Answer::json(200, &json!({ "status": "ok" }));
    match head.uri.path() {
        "/status" => ok(),
        "/status/ready" if ready() => ok(),
        "/status/ready" => {
            // Workers take a configuration over together: the first stands for all.
            let error = "worker id: 0 has not received configuration";
            Answer::json(503, &json!({ "status": "error", "error": error }))
        }
        _ => Answer::refuse(404, "404 Route Not Found"),
    }
}
