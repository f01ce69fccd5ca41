//! The JSON schema of recipes, found out by asking the reader itself.
//!
//! The reader is the only place that knows the keys. It is given made-up recipes, each of keys that it asked for before;
//! what it asks for is the schema, until many recipes in a row have brought nothing new. So a key cannot be read and be
//! absent from the schema, nor the other way round.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::kind::{Asked, Kind};
use super::reader::{Reading, Section};
use super::yaml::{self, Entry, Literal, Node, Scalar, Value};
use super::{NAMED_VALIDATION, read};
use crate::data::SplitMix64;
use crate::error::{Error, Origin, Result};

/// So many recipes for every kind of section, in a row, that bring nothing new end the search.
const PATIENCE: usize = 25;

/// A section, with its `_target_`.
type Place = (String, Option<String>);

/// What is known of a key: its kinds, and what it does.
type Key = Vec<(Kind, String)>;

/// What the reader has asked for so far.
#[derive(Default)]
struct Explored {
    keys: BTreeMap<Place, BTreeMap<String, Key>>,
    /// Keys whose absence was an error, and those that were absent from a recipe that was accepted.
    missed: BTreeSet<(Place, String)>,
    done_without: BTreeSet<(Place, String)>,
}

/// The JSON schema (draft 2020-12) of recipes.
pub fn json_schema() -> Json {
    let explored = Explored::new();
    let mut schema = explored.section("", &mut BTreeSet::new());
    let object = schema.as_object_mut().expect("a recipe is an object");
    // Held-out data are of the same kinds as training data.
    let properties = &mut object["properties"];
    if properties["validation_dataset"]["anyOf"] == properties["dataset"]["anyOf"] {
        properties["validation_dataset"] = json!({"$ref": "#/properties/dataset"});
    }
    object.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    object.insert(
        "title".to_owned(),
        json!("A training recipe of mistral4, in the keys of NVIDIA NeMo AutoModel"),
    );
    let named = json!({format!("^{NAMED_VALIDATION}."): {"$ref": "#/properties/validation_dataset"}});
    object.insert("patternProperties".to_owned(), named);
    schema
}

/// A recipe's YAML as JSON, environment variables as written: what a schema checks.
///
/// # Errors
/// What is not YAML of the kind that a recipe may hold.
pub fn to_json(name: &str, bytes: &[u8]) -> Result<Json> {
    Ok(node_to_json(&yaml::parse(&Arc::from(name), bytes)?))
}

fn node_to_json(node: &Node) -> Json {
    match &node.value {
        Value::Scalar(scalar) => match scalar.literal {
            Literal::Null => Json::Null,
            Literal::Bool(value) => json!(value),
            Literal::Int(value) => json!(value),
            Literal::Float(value) => json!(value),
            Literal::Text => json!(scalar.text),
        },
        Value::List(items) => Json::Array(items.iter().map(node_to_json).collect()),
        Value::Map(entries) => {
            Json::Object(entries.iter().map(|entry| (entry.key.clone(), node_to_json(&entry.node))).collect())
        }
    }
}

impl Explored {
    fn new() -> Self {
        let mut explored = Self::default();
        let mut random = SplitMix64::new(0, 0);
        let mut accepted: Option<Node> = None;
        let mut idle = 0;
        while accepted.is_none() || idle < PATIENCE * explored.keys.len() {
            // Once a recipe was accepted, one section of it is made up anew at a time.
            let recipe = match &accepted {
                None => explored.make_up("", None, &mut random),
                Some(accepted) => {
                    let places: Vec<&Place> = explored.keys.keys().collect();
                    let place = places[random.below(places.len() as u64) as usize];
                    let top = place.0.split('.').next().unwrap_or_default();
                    match top {
                        "" => explored.make_up("", None, &mut random),
                        top => with(accepted.clone(), top, explored.make_up(top, Some(place), &mut random)),
                    }
                }
            };
            let (is_new, is_accepted) = explored.learn(&recipe);
            if is_accepted && accepted.is_none() {
                accepted = Some(recipe);
            }
            idle = if is_new { 0 } else { idle + 1 };
        }
        explored
    }

    /// Gives a recipe to the reader; says whether that brought anything new, and whether it was accepted.
    fn learn(&mut self, recipe: &Node) -> (bool, bool) {
        let asked = Some(RefCell::default());
        let reading = Reading { file: Arc::from(""), report: RefCell::default(), asked };
        let result = read(Section::root(&reading, recipe));
        let mut is_new = false;
        let asked = reading.asked.expect("it was set above").into_inner();
        for Asked { section, target, key, kind, what } in asked {
            let kinds = self.keys.entry((section, target)).or_default().entry(key).or_default();
            if !kinds.iter().any(|(known, _)| *known == kind) {
                kinds.push((kind, what));
                is_new = true;
            }
        }
        let is_accepted = result.is_ok();
        match result {
            Ok(_) => is_new |= self.note_absent("", recipe),
            Err(Error::MissingKey { key, .. }) => {
                let (section, key) = key.rsplit_once('.').unwrap_or(("", &key));
                is_new |=
                    self.missed.insert(((section.to_owned(), target(at(recipe, section))), key.to_owned()));
            }
            Err(_) => {}
        }
        (is_new, is_accepted)
    }

    /// Notes every key of the sections of an accepted recipe that was not in it.
    fn note_absent(&mut self, path: &str, node: &Node) -> bool {
        let place = (path.to_owned(), target(Some(node)));
        let Some(keys) = self.keys.get(&place) else { return false };
        let (mut is_new, mut nested) = (false, Vec::new());
        for (key, kinds) in keys {
            match child(node, key) {
                Some(node)
                    if kinds.iter().any(|(kind, _)| *kind == Kind::Section) && node.map().is_some() =>
                {
                    nested.push((join(path, key), node));
                }
                Some(_) => {}
                None => is_new |= self.done_without.insert((place.clone(), key.clone())),
            }
        }
        for (path, node) in nested {
            is_new |= self.note_absent(&path, node);
        }
        is_new
    }

    /// A section of keys that are known, most of them valid; `wanted` is a section in it that it shall have.
    fn make_up(&self, path: &str, wanted: Option<&Place>, random: &mut SplitMix64) -> Node {
        let targets = self.targets(path);
        let target = match random.below(targets.len() as u64 + 1) as usize {
            _ if wanted.is_some_and(|(wanted, _)| wanted == path) => {
                wanted.and_then(|(_, target)| target.clone())
            }
            0 => None,
            chosen => Some(targets[chosen - 1].clone()),
        };
        let leads_to_wanted = |path: &str| {
            wanted.is_some_and(|(wanted, _)| wanted == path || wanted.starts_with(&format!("{path}.")))
        };
        let place = (path.to_owned(), target.clone());
        let mut entries = Vec::new();
        let mut add =
            |key: &str, node| entries.push(Entry { key: key.to_owned(), origin: Origin::Override, node });
        if let Some(target) = target {
            add("_target_", scalar(&target));
        }
        // Half of the sections are sparse: keys that exclude each other are then often apart.
        let sparse = random.below(2) == 0;
        for (key, kinds) in self.keys.get(&place).into_iter().flatten().filter(|(key, _)| *key != "_target_")
        {
            let is_required = self.missed.contains(&(place.clone(), key.clone()));
            let nested = join(path, key);
            let chance = if is_required {
                15
            } else if sparse {
                3
            } else {
                10
            };
            if leads_to_wanted(&nested) {
                add(key, self.make_up(&nested, wanted, random));
            } else if random.below(16) < chance {
                let (kind, _) = &kinds[random.below(kinds.len() as u64) as usize];
                add(key, self.value(kind, &nested, random));
            }
        }
        Node { origin: Origin::Override, value: Value::Map(entries) }
    }

    fn value(&self, kind: &Kind, path: &str, random: &mut SplitMix64) -> Node {
        let mut one_of = |values: &[&str]| scalar(values[random.below(values.len() as u64) as usize]);
        match kind {
            Kind::Bool => one_of(&["true", "false"]),
            Kind::Whole { least, .. } => one_of(&[&least.to_string(), "8", "64"]),
            Kind::NonNegative => one_of(&["0", "0.5", "1"]),
            Kind::Text | Kind::Texts => one_of(&["text", "true"]),
            Kind::Anything => one_of(&["false", "1"]),
            Kind::Pair => {
                let value = Value::List(vec![scalar("0.5"), scalar("0.5")]);
                Node { origin: Origin::Override, value }
            }
            Kind::Name(names) => one_of(names),
            Kind::Section => self.make_up(path, None, random),
        }
    }

    /// The values that a section's `_target_` may have.
    fn targets(&self, path: &str) -> Vec<String> {
        let places = self.keys.iter().filter(|((section, _), _)| section == path);
        let kinds = places.filter_map(|(_, keys)| keys.get("_target_")).flatten();
        let mut targets = BTreeSet::new();
        for (kind, _) in kinds {
            if let Kind::Name(names) = kind {
                targets.extend(names.iter().map(|&name| name.to_owned()));
            }
        }
        targets.into_iter().collect()
    }

    /// The schema of a section: one form where its keys do not depend on what it is, else one for each kind.
    fn section(&self, path: &str, seen: &mut BTreeSet<String>) -> Json {
        assert!(seen.insert(path.to_owned()), "{path} is a part of itself");
        // Targets by the form of their sections.
        let mut forms: Vec<(Json, Vec<Option<String>>)> = Vec::new();
        for place in self.keys.keys().filter(|(section, _)| section == path) {
            let form = self.form(place, seen);
            // Without a `_target_` that it needs, it is no section of any kind.
            if place.1.is_none()
                && form["required"].as_array().is_some_and(|keys| keys.contains(&json!("_target_")))
            {
                continue;
            }
            match forms.iter_mut().find(|(known, _)| *known == form) {
                Some((_, targets)) => targets.push(place.1.clone()),
                None => forms.push((form, vec![place.1.clone()])),
            }
        }
        seen.remove(path);
        let one = forms.len() == 1;
        let mut forms = forms.into_iter().map(|(mut form, targets)| {
            let names: Vec<&String> = targets.iter().flatten().collect();
            if !one && !names.is_empty() {
                form["properties"]["_target_"] = json!({"enum": names});
                if !targets.contains(&None) {
                    form["required"].as_array_mut().expect("every form has it").insert(0, json!("_target_"));
                }
            } else if !one && let Some(properties) = form["properties"].as_object_mut() {
                properties.shift_remove("_target_");
            }
            form
        });
        if one { forms.next().expect("there is one") } else { json!({"anyOf": forms.collect::<Vec<_>>()}) }
    }

    /// The schema of a section of one kind.
    fn form(&self, place: &Place, seen: &mut BTreeSet<String>) -> Json {
        let mut properties = Map::new();
        for (key, kinds) in &self.keys[place] {
            // Where the reader looks at a value at all, it must be one that it takes.
            let is_read = kinds.iter().any(|(kind, _)| *kind != Kind::Anything);
            let mut schemas: Vec<Json> = Vec::new();
            for (kind, _) in kinds.iter().filter(|(kind, _)| !is_read || *kind != Kind::Anything) {
                let nested = join(&place.0, key);
                let has_keys = self.keys.keys().any(|(section, _)| *section == nested);
                let more = match kind {
                    Kind::Section if has_keys => vec![self.section(&nested, seen)],
                    kind => kind.schemas(),
                };
                for schema in more {
                    if !schemas.contains(&schema) {
                        schemas.push(schema);
                    }
                }
            }
            let mut property = json!({});
            if is_read {
                // An empty value is as good as none.
                schemas.push(json!({"type": "null"}));
                property["anyOf"] = json!(schemas);
            }
            let mut what: Vec<&str> =
                kinds.iter().map(|(_, what)| what.as_str()).filter(|what| !what.is_empty()).collect();
            what.dedup();
            if !what.is_empty() {
                property["description"] = json!(what.join("; "));
            }
            properties.insert(key.clone(), property);
        }
        let required = properties.keys().filter(|key| {
            let key = (place.clone(), (*key).clone());
            self.missed.contains(&key) && !self.done_without.contains(&key)
        });
        let required: Vec<String> = required.cloned().collect();
        json!({
            "type": "object", "properties": properties, "required": required, "additionalProperties": false
        })
    }
}

fn scalar(text: &str) -> Node {
    Node { origin: Origin::Override, value: Value::Scalar(Scalar::new(text.to_owned())) }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// A recipe with another value of one of its keys.
fn with(mut recipe: Node, key: &str, node: Node) -> Node {
    if let Value::Map(entries) = &mut recipe.value {
        entries.retain(|entry| entry.key != key);
        entries.push(Entry { key: key.to_owned(), origin: Origin::Override, node });
    }
    recipe
}

fn child<'n>(node: &'n Node, key: &str) -> Option<&'n Node> {
    node.map()?.iter().find(|entry| entry.key == key).map(|entry| &entry.node)
}

/// The section at a dotted path.
fn at<'n>(root: &'n Node, path: &str) -> Option<&'n Node> {
    path.split('.').filter(|key| !key.is_empty()).try_fold(root, |node, key| child(node, key))
}

fn target(node: Option<&Node>) -> Option<String> {
    match &child(node?, "_target_")?.value {
        Value::Scalar(scalar) => Some(scalar.text.clone()),
        _ => None,
    }
}
