//! Images of a conversation: named in its parts, or in columns beside it.

use mistral4_processor::json::Json;

use super::row::Row;
use crate::error::Result;

/// What stands in a text for an image of the row's columns.
const MARKER: &str = "<image>";

/// Brings the images of a row's messages to the parts that the chat form reads: `{"type": "image", "path"}` for a file,
/// `{"type": "image", "image"}` for base64 or a data URL.
///
/// Images of the columns `image` and `images` take the places of bare image parts, else of `<image>` in the texts, else
/// they come first in the first user message (as TRL does).
///
/// # Errors
/// Images that must be fetched, that are of no known form, or that are not as many as their places.
pub(super) fn place(row: &Row, messages: Json) -> Result<Json> {
    let Json::Array(mut messages) = messages else { return Ok(messages) };
    for (i, message) in messages.iter_mut().enumerate() {
        let Some(parts) = parts(message) else { continue };
        for (j, part) in parts.iter_mut().enumerate() {
            let at = || format!("messages[{i}].content[{j}]");
            if kind(part) == Some("image_url") {
                let url = part.get("image_url");
                let url = url.and_then(|url| url.as_str().or_else(|| url.get("url")?.as_str()));
                refuse_remote(row, &at(), url.unwrap_or_default())?;
            } else if kind(part) == Some("image") && !is_bare(part) {
                let value = part.get("image").filter(|value| !value.is_null()).unwrap_or(part).clone();
                *part = image_part(row, &at(), &value)?;
            }
        }
    }
    let images = columns(row)?;
    if images.is_empty() {
        return Ok(Json::Array(messages));
    }
    let bare = messages.iter_mut().filter_map(parts).flatten().filter(|part| is_bare(part)).count();
    let markers: usize = messages.iter().map(markers).sum();
    let places = if bare > 0 { bare } else { markers };
    if places > 0 && places != images.len() {
        let message = format!("{} images for {places} places in the messages", images.len());
        return Err(row.error("images", message));
    }
    let mut images = images.into_iter();
    let mut next = || images.next().expect("as many images as places");
    if bare > 0 {
        let parts = messages.iter_mut().filter_map(parts).flatten();
        parts.filter(|part| is_bare(part)).for_each(|part| *part = next());
    } else if markers > 0 {
        messages.iter_mut().for_each(|message| split_at_markers(message, &mut next));
    } else {
        let is_user = |message: &&mut Json| message.get("role").and_then(Json::as_str) == Some("user");
        let Some(Json::Object(first)) = messages.iter_mut().find(is_user) else {
            return Err(row.error("images", "no user message to put them in"));
        };
        let mut content: Vec<Json> = images.collect();
        match first.shift_remove("content") {
            Some(Json::Array(parts)) => content.extend(parts),
            Some(Json::String(text)) => content.push(text_part(text)),
            _ => {}
        }
        first.insert("content".to_owned(), Json::Array(content));
    }
    Ok(Json::Array(messages))
}

fn parts(message: &mut Json) -> Option<&mut Vec<Json>> {
    match message {
        Json::Object(message) => match message.get_mut("content") {
            Some(Json::Array(parts)) => Some(parts),
            _ => None,
        },
        _ => None,
    }
}

fn kind(part: &Json) -> Option<&str> {
    part.get("type").and_then(Json::as_str)
}

/// An image part that does not say which image.
fn is_bare(part: &Json) -> bool {
    let says = |key: &&str| part.get(key).is_some_and(|value| !value.is_null());
    kind(part) == Some("image") && !["path", "image", "bytes", "url"].iter().any(says)
}

/// The images of a row's `image` and `images` columns, as parts.
fn columns(row: &Row) -> Result<Vec<Json>> {
    for key in ["video", "videos", "audio", "audios"] {
        let value = row.value.get(key).filter(|value| !value.is_null());
        if value.is_some_and(|value| *value != Json::Array(Vec::new())) {
            return Err(row.error(key, "the model sees images and text only"));
        }
    }
    let mut images = Vec::new();
    for key in ["image", "images"] {
        match row.value.get(key) {
            None | Some(Json::Null) => {}
            Some(Json::Array(values)) => {
                for (i, value) in values.iter().enumerate() {
                    images.push(image_part(row, &format!("{key}[{i}]"), value)?);
                }
            }
            Some(value) => images.push(image_part(row, key, value)?),
        }
    }
    Ok(images)
}

/// An image as a text (a file's name, a data URL, base64) or as the `{bytes, path}` of the datasets library.
pub(super) fn image_part(row: &Row, at: &str, value: &Json) -> Result<Json> {
    let text = |key| value.get(key).and_then(Json::as_str);
    let (key, source) = match value {
        Json::String(source) if is_name(source) => ("path", source.as_str()),
        Json::String(source) => ("image", source.as_str()),
        _ => match (text("bytes"), text("path"), text("url")) {
            (Some(bytes), ..) => ("image", bytes),
            (None, Some(path), _) => ("path", path),
            (None, None, Some(url)) => ("image", url),
            (None, None, None) => {
                let message = "an image is a path, a data URL, base64, or an object with `bytes` or `path`";
                return Err(row.error(at, message));
            }
        },
    };
    refuse_remote(row, at, source)?;
    Ok(object([("type", "image"), (key, source)]))
}

/// Names end in what their pictures are; base64 holds no full stop.
fn is_name(source: &str) -> bool {
    let extension = source.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    let known = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];
    !source.starts_with("data:")
        && !is_remote(source)
        && extension.is_some_and(|extension| known.contains(&extension.as_str()))
        && !source.starts_with("file:")
}

fn is_remote(source: &str) -> bool {
    ["http:", "https:", "s3:", "gs:", "hf:"].iter().any(|scheme| source.starts_with(scheme))
}

fn refuse_remote(row: &Row, at: &str, source: &str) -> Result<()> {
    if is_remote(source) {
        let shown: String = source.chars().take(64).collect();
        let message = format!("`{shown}`: images are not fetched; download them and name the files");
        return Err(row.error(at, message));
    }
    Ok(())
}

fn object<const N: usize>(entries: [(&str, &str); N]) -> Json {
    let entries = entries.map(|(key, value)| (key.to_owned(), Json::String(value.to_owned())));
    Json::Object(entries.into_iter().collect())
}

pub(super) fn text_part(text: String) -> Json {
    object([("type", "text"), ("text", &text)])
}

fn texts(message: &Json) -> Vec<&str> {
    match message.get("content") {
        Some(Json::String(text)) => vec![text.as_str()],
        Some(Json::Array(parts)) => parts
            .iter()
            .filter(|part| kind(part) == Some("text"))
            .filter_map(|part| part.get("text")?.as_str())
            .collect(),
        _ => Vec::new(),
    }
}

fn markers(message: &Json) -> usize {
    texts(message).iter().map(|text| text.matches(MARKER).count()).sum()
}

/// Cuts the texts of a message at their markers, an image at each cut. Line breaks that only set a marker apart go.
fn split_at_markers(message: &mut Json, next: &mut impl FnMut() -> Json) {
    if markers(message) == 0 {
        return;
    }
    let Json::Object(message) = message else { return };
    let old = match message.shift_remove("content") {
        Some(Json::String(text)) => vec![text_part(text)],
        Some(Json::Array(parts)) => parts,
        _ => Vec::new(),
    };
    let mut content = Vec::new();
    for part in old {
        let Some(text) = part.get("text").and_then(Json::as_str).filter(|_| kind(&part) == Some("text"))
        else {
            content.push(part);
            continue;
        };
        for (i, piece) in text.split(MARKER).enumerate() {
            if i > 0 {
                content.push(next());
            }
            let piece = if i > 0 { piece.strip_prefix('\n').unwrap_or(piece) } else { piece };
            if !piece.is_empty() {
                content.push(text_part(piece.to_owned()));
            }
        }
    }
    message.insert("content".to_owned(), Json::Array(content));
}
