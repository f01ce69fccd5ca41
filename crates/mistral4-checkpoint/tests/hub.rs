//! Downloads from a hub that is a thread of this test.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use mistral4_checkpoint::Error;
use mistral4_checkpoint::hub::{HubOptions, Progress, resolve};
use serde_json::json;

const MODEL: &str = "owner/name";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    path: String,
    range: Option<usize>,
    authorization: Option<String>,
}

/// What the server answers: status, body, and after how many bytes of it the connection breaks.
struct Answer {
    status: u16,
    body: Vec<u8>,
    cut: Option<usize>,
}

fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer { status: 200, body: body.into(), cut: None }
}

fn status(status: u16) -> Answer {
    Answer { status, body: b"no".to_vec(), cut: None }
}

struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    fn start(answer: impl Fn(&Request, usize) -> Answer + Send + 'static) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Some((request, stream)) = read(stream.unwrap()) else { continue };
                let count = {
                    let mut seen = seen.lock().unwrap();
                    seen.push(request.clone());
                    seen.len()
                };
                // A client that has gone is no concern of the hub.
                let _ = write(stream, &request, answer(&request, count));
            }
        });
        Hub { endpoint, requests }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            revision: "main".into(),
            offline: false,
            endpoint: self.endpoint.clone(),
            token: None,
            cache: cache.to_path_buf(),
        }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn read(stream: TcpStream) -> Option<(Request, TcpStream)> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, range: None, authorization: None };
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "range" => request.range = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some((request, stream))
}

fn write(mut stream: TcpStream, request: &Request, answer: Answer) -> std::io::Result<()> {
    let from = request.range.unwrap_or(0).min(answer.body.len());
    let status = if from > 0 && answer.status == 200 { 206 } else { answer.status };
    let body = &answer.body[from..];
    write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    stream.write_all(&body[..answer.cut.unwrap_or(body.len()).min(body.len())])
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|index| (index % 251) as u8).collect()
}

fn listing(size: usize) -> Answer {
    ok(json!({
        "sha": COMMIT,
        "siblings": [
            {"rfilename": "config.json", "size": 2, "blobId": "aa"},
            {"rfilename": "README.md", "size": 9, "blobId": "ab"},
            {"rfilename": "model.safetensors", "size": size, "blobId": "ac",
             "lfs": {"sha256": "bb", "size": size}},
        ],
    })
    .to_string())
}

/// A hub that works, apart from what `weight_file` says about the weights.
fn hub(weight_file: impl Fn(&Request, usize) -> Answer + Send + 'static) -> Hub {
    Hub::start(move |request, count| match request.path.as_str() {
        "/api/models/owner/name/revision/main?blobs=true" => listing(weights().len()),
        path if path == format!("/owner/name/resolve/{COMMIT}/config.json") => ok("{}"),
        path if path == format!("/owner/name/resolve/{COMMIT}/model.safetensors") => {
            weight_file(request, count)
        }
        _ => status(404),
    })
}

fn fetch(options: &HubOptions) -> Result<std::path::PathBuf, Error> {
    resolve(MODEL, options, &mut |_| {})
}

#[test]
fn a_model_is_downloaded_once_into_the_shared_layout() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(|_, _| ok(weights()));
    let mut options = hub.options(cache.path());
    options.token = Some("secret".into());
    let mut last = (0, 0);
    let folder = resolve(MODEL, &options, &mut |progress| {
        if let Progress::File { name: "model.safetensors", place, bytes } = progress {
            assert_eq!(place, (1, 2));
            assert!(bytes.0 >= last.0 && bytes.0 <= bytes.1);
            last = bytes;
        }
    })
    .unwrap();
    assert_eq!(last, (300_000, 300_000));
    let root = cache.path().join("models--owner--name");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read(root.join("blobs/bb")).unwrap(), weights());
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert!(!folder.join("README.md").exists());
    assert!(hub.requests().iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")));
    let before = hub.requests().len();
    assert_eq!(fetch(&options).unwrap(), folder);
    assert_eq!(hub.requests().len(), before + 1, "only the list is asked for again");
    options.offline = true;
    assert_eq!(fetch(&options).unwrap(), folder);
    assert_eq!(hub.requests().len(), before + 1);
}

#[test]
fn a_broken_connection_is_continued_where_it_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(|request, _| {
        let cut = if request.range.is_none() { Some(100_000) } else { None };
        Answer { cut, ..ok(weights()) }
    });
    let folder = fetch(&hub.options(cache.path())).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<Option<usize>> =
        hub.requests().iter().filter(|r| r.path.ends_with("model.safetensors")).map(|r| r.range).collect();
    assert_eq!(ranges.len(), 2);
    let resumed = ranges[1].unwrap();
    assert!((1..=100_000).contains(&resumed), "{resumed}");
}

#[test]
fn a_killed_run_is_continued_by_the_next() {
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--owner--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join("bb.incomplete"), &weights()[..123_456]).unwrap();
    let hub = hub(|_, _| ok(weights()));
    let folder = fetch(&hub.options(cache.path())).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(hub.requests().iter().any(|request| request.range == Some(123_456)));
    assert!(!blobs.join("bb.incomplete").exists());
}

#[test]
fn a_hub_that_always_breaks_off_is_an_error_that_says_to_go_on() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(|_, _| Answer { cut: Some(0), ..ok(weights()) });
    let error = fetch(&hub.options(cache.path())).unwrap_err().to_string();
    assert!(error.contains("`model.safetensors` failed 5 times"), "{error}");
    assert!(error.contains("run it again"), "{error}");
    let mut offline = hub.options(cache.path());
    offline.offline = true;
    assert!(fetch(&offline).is_err(), "an unfinished download is no model");
}

#[test]
fn a_file_of_another_size_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let mut longer = weights();
    longer.push(0);
    let hub = hub(move |_, _| ok(longer.clone()));
    let error = fetch(&hub.options(cache.path())).unwrap_err().to_string();
    assert!(error.contains("300001 bytes, though the hub's list says 300000"), "{error}");
    assert!(!cache.path().join("models--owner--name/blobs/bb").exists());
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    for (code, token, expected) in [
        (401, None, "set HF_TOKEN"),
        (403, Some("t"), "accept the model's terms"),
        (404, None, "no such model, revision or file"),
    ] {
        let hub = Hub::start(move |_, _| status(code));
        let mut options = hub.options(cache.path());
        options.token = token.map(str::to_owned);
        let error = fetch(&options).unwrap_err().to_string();
        assert!(error.contains(expected), "{code}: {error}");
        assert_eq!(hub.requests().len(), 1, "a refusal is not asked for again");
    }
}

#[test]
fn without_network_the_cache_serves_and_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(|_, _| ok(weights()));
    let mut options = hub.options(cache.path());
    let folder = fetch(&options).unwrap();
    // A port that was free a moment ago: nobody listens.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    options.endpoint = format!("http://127.0.0.1:{port}");
    let mut told = false;
    let again = resolve(MODEL, &options, &mut |progress| told |= matches!(progress, Progress::Cached { .. }))
        .unwrap();
    assert_eq!((again, told), (folder, true));
    let empty = tempfile::tempdir().unwrap();
    options.cache = empty.path().to_path_buf();
    let error = fetch(&options).unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("not in the cache"), "{error}");
    options.offline = true;
    let error = fetch(&options).unwrap_err().to_string();
    assert!(error.contains("the network is off"), "{error}");
}

#[test]
fn folders_are_taken_as_they_are_and_other_names_refused() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start(|_, _| status(500));
    let options = hub.options(folder.path());
    let name = folder.path().to_str().unwrap();
    assert_eq!(resolve(name, &options, &mut |_| {}).unwrap(), folder.path());
    for name in ["no/such/folder", "./nothing", "nothing"] {
        let error = resolve(name, &options, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("no such folder"), "{error}");
    }
    assert_eq!(hub.requests(), []);
}

#[test]
fn an_answer_that_is_no_listing_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    for body in ["<html>", "{}", r#"{"sha": "../../x", "siblings": []}"#, r#"{"sha": "ab", "siblings": []}"#]
    {
        let hub = Hub::start(move |_, _| ok(body));
        assert!(fetch(&hub.options(cache.path())).is_err(), "{body}");
    }
}
