//! Requests to the hub.

use std::io::Read;
use std::time::Duration;

use serde_json::Value;
use ureq::http::StatusCode;

use super::{HubOptions, hub_error};
use crate::error::Error;

/// A file of a model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    /// Hash of the content, which names it in the cache.
    pub(super) blob: String,
    /// Size in bytes, if the hub tells.
    pub(super) size: Option<u64>,
}

/// Why a request gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer, or one that says to try again; a copy in the cache may serve.
    Unreachable(String),
    /// An answer that will not change.
    Refused(Error),
}

/// A connection to the hub for one model.
pub(super) struct Client<'a> {
    pub(super) model: &'a str,
    options: &'a HubOptions,
    agent: ureq::Agent,
}

/// The start of a download.
pub(super) struct Download {
    /// Whether the body starts at the byte asked for; otherwise it starts at 0.
    pub(super) resumed: bool,
    pub(super) body: Box<dyn Read>,
}

impl<'a> Client<'a> {
    pub(super) fn new(model: &'a str, options: &'a HubOptions) -> Self {
        let mut config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .accept_encoding("identity")
            .user_agent(concat!("mistral4/", env!("CARGO_PKG_VERSION")));
        let host = options.endpoint.split_once("://").map_or("", |(_, rest)| rest);
        if ["localhost", "127.0.0.1", "[::1]"].iter().any(|own| host.starts_with(own)) {
            // A proxy of the environment is for other machines.
            config = config.proxy(None);
        }
        Client { model, options, agent: config.build().new_agent() }
    }

    /// The commit of the revision, and its files.
    pub(super) fn list(&self) -> Result<(String, Vec<RemoteFile>), Failure> {
        let revision = self.options.revision.replace('/', "%2F");
        let url =
            format!("{}/api/models/{}/revision/{revision}?blobs=true", self.options.endpoint, self.model);
        let mut response = self.get(&url, 0)?;
        let problem = "the hub's answer is not understood";
        let refused = || Failure::Refused(hub_error(self.model, problem, "check HF_ENDPOINT"));
        let text = response.body_mut().read_to_string().map_err(|e| Failure::Unreachable(e.to_string()))?;
        let answer: Value = serde_json::from_str(&text).map_err(|_| refused())?;
        let is_hash =
            |text: &str| !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let commit = answer["sha"].as_str().filter(|sha| is_hash(sha)).ok_or_else(refused)?;
        let files = answer["siblings"].as_array().ok_or_else(refused)?.iter().filter_map(|file| {
            // Large files are named by the hash of their content, others by that of git.
            let blob = file
                .pointer("/lfs/sha256")
                .or_else(|| file.pointer("/lfs/oid"))
                .or_else(|| file.get("blobId"));
            let size = file.pointer("/lfs/size").or_else(|| file.get("size")).and_then(Value::as_u64);
            let blob = blob.and_then(Value::as_str).filter(|blob| is_hash(blob))?;
            Some(RemoteFile { name: file["rfilename"].as_str()?.to_owned(), blob: blob.to_owned(), size })
        });
        Ok((commit.to_owned(), files.collect()))
    }

    /// Starts to download a file, from a byte on.
    pub(super) fn download(&self, commit: &str, file: &RemoteFile, from: u64) -> Result<Download, Failure> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.options.endpoint, self.model, file.name);
        let response = self.get(&url, from)?;
        let resumed = response.status() == StatusCode::PARTIAL_CONTENT;
        Ok(Download { resumed, body: Box::new(response.into_body().into_reader()) })
    }

    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, Failure> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.options.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|error| Failure::Unreachable(error.to_string()))?;
        let refused = |problem: &str, fix: &str| Err(Failure::Refused(hub_error(self.model, problem, fix)));
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            401 | 403 => match self.options.token {
                None => refused(
                    "the hub refuses access: the model is private, gated or does not exist",
                    "check the name, and set HF_TOKEN to a token that may read it",
                ),
                Some(_) => refused(
                    "the hub refuses access with this token",
                    "check the name, and accept the model's terms on its page or use another HF_TOKEN",
                ),
            },
            404 => refused(
                &format!("the hub has no such model, revision or file ({url})"),
                "check the name and the revision",
            ),
            status => Err(Failure::Unreachable(format!("{url} answers with status {status}"))),
        }
    }
}
