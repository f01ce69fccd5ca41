//! The live page of a run: a small web server on this machine alone that reads the run's folder.
//!
//! `GET /` is the page, which needs nothing from the network; `GET /api/run?generation=G&after=S` is what it polls: the
//! run's status, every step after `S` in columns, held-out losses, and the load of the experts. A client whose
//! generation is not the server's gets everything.

mod feed;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use axum::extract::{Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use feed::Feed;

/// Port that is tried when none is asked for.
pub const DEFAULT_PORT: u16 = 6480;

const PAGE: &str = include_str!("page.html");

/// The page may run its own script and style and ask this server; nothing else.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A server under way; it ends when this is dropped.
pub struct Dashboard {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Dashboard {
    /// Serves the run in `folder` on `127.0.0.1`; port 0 takes any that is free.
    ///
    /// # Errors
    /// A port that is taken.
    pub fn start(folder: &Path, port: u16) -> Result<Self> {
        let failed = |source| Error::Port { port, source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port))).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let app = router(folder, address.port());
        let thread = std::thread::spawn(move || {
            let ended = async { stopped.await.unwrap_or(()) };
            let serve = axum::serve(listener, app).with_graceful_shutdown(ended);
            // The page is a convenience: when its connection breaks, the run goes on.
            let _ = runtime.block_on(serve.into_future());
        });
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// The address to open in a browser.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn router(folder: &Path, port: u16) -> Router {
    let feed = Arc::new(Mutex::new(Feed::new(folder)));
    Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/api/run", get(news))
        .with_state(feed)
        .layer(middleware::from_fn(move |request, next| guard(port, request, next)))
}

/// Refuses requests under another name, which a page of another site could make this browser send here, and says what
/// the page may do.
async fn guard(port: u16, request: Request, next: Next) -> Response {
    let names = [format!("127.0.0.1:{port}"), format!("localhost:{port}")];
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    if !host.is_some_and(|host| names.iter().any(|name| name == host)) {
        return (StatusCode::FORBIDDEN, "this page is served to this machine only").into_response();
    }
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().insert(name, header::HeaderValue::from_static(value));
    }
    response
}

async fn news(State(feed): State<Arc<Mutex<Feed>>>, uri: Uri) -> Response {
    let parameter = |name: &str| {
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<i64>().ok())
    };
    let (generation, after) = (parameter("generation").unwrap_or(-1), parameter("after").unwrap_or(-1));
    let mut feed = feed.lock().unwrap_or_else(PoisonError::into_inner);
    match feed.news(generation, after) {
        Ok(news) => Json(news).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use serde_json::Value;

    use super::*;
    use crate::metrics::{ExpertLoad, LayerLoad, MetricsFile, RunState, RunStatus, StepMetrics, timestamp};

    /// Status line with headers, and body.
    fn get(address: SocketAddr, path: &str, host: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    fn step(step: usize) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0,
            timestamp: timestamp(),
            loss: if step == 1 { f64::NAN } else { 2.0 - 0.1 * step as f64 },
            grad_norm: 1.0,
            lr: 1e-3,
            mem: 0.5,
            tps: 100.0,
            tps_per_gpu: 100.0,
            num_tokens_per_step: 10,
            num_label_tokens: 9,
            more: serde_json::Map::new(),
        }
    }

    #[test]
    fn a_run_is_served_to_this_machine_alone() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsFile::open(&folder.path().join("training.jsonl"), 0).unwrap();
        let mut load = MetricsFile::open(&folder.path().join("expert_load.jsonl"), 0).unwrap();
        (0..3).for_each(|i| log.write(&step(i)).unwrap());
        load.write(&ExpertLoad { step: 2, layers: vec![LayerLoad { layer: 1, tokens: vec![3, 5] }] })
            .unwrap();
        let status = RunStatus {
            state: RunState::Running,
            total_steps: 10,
            parameters: 8,
            trained_parameters: 6,
            message: None,
        };
        status.write(folder.path()).unwrap();
        let dashboard = Dashboard::start(folder.path(), 0).unwrap();
        let address = dashboard.address;
        assert!(address.ip().is_loopback());
        let host = address.to_string();
        let (head, body) = get(address, "/", &host);
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("default-src 'none'"), "{head}");
        // Everything is in the page itself.
        assert!(
            body.starts_with("<!doctype html>") && !body.contains("src=\"http") && !body.contains("url(")
        );

        let news = |query: &str| -> Value {
            let (head, body) = get(address, &format!("/api/run{query}"), &host);
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            serde_json::from_str(&body).unwrap()
        };
        let all = news("");
        assert_eq!(all["steps"].as_array().unwrap().len(), 3);
        assert!(all["steps"][1][1].is_null(), "{all}");
        assert_eq!(all["status"]["total_steps"], 10);
        assert_eq!(all["load"]["layers"][0]["tokens"], serde_json::json!([3, 5]));
        let generation = &all["generation"];
        log.write(&step(3)).unwrap();
        let later = news(&format!("?generation={generation}&after=2"));
        assert_eq!(later["steps"].as_array().unwrap().len(), 1);
        // A resumed run begins its file again at an earlier step: everything is sent again.
        MetricsFile::open(&folder.path().join("training.jsonl"), 1).unwrap();
        let again = news(&format!("?generation={generation}&after=3"));
        assert_ne!(&again["generation"], generation);
        assert_eq!(again["steps"].as_array().unwrap().len(), 1);

        assert!(get(address, "/", "evil.example").0.starts_with("HTTP/1.1 403"));
        assert!(get(address, "/other", &host).0.starts_with("HTTP/1.1 404"));
        let taken = Dashboard::start(folder.path(), address.port()).err().unwrap().to_string();
        assert!(taken.contains(&address.port().to_string()), "{taken}");
        drop(dashboard);
        assert!(TcpStream::connect(address).is_err());
    }
}
