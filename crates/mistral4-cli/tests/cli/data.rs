//! `mistral4 data inspect` and `mistral4 recipe schema`.

use serde_json::Value;

use crate::support::Place;

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the fox"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]}
"#;

#[test]
fn inspect_shows_what_is_learned() {
    let place = Place::with_model();
    place.write("chat.jsonl", CHAT);
    let inspect = ["data", "inspect", "--data", "chat.jsonl", "--model", "model"];
    let outcome = place.run(&inspect);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    // The output is no terminal, so there are no colours.
    insta::assert_snapshot!(outcome.stdout);
    let outcome = place.run(&[&inspect[..], &["--set", "dataset.mask_history=true"]].concat());
    assert!(outcome.stdout.contains("one</s>[INST]b[/INST]«two</s>»"), "{}", outcome.stdout);
    let packed = place.run(&[&inspect[..], &["--set=packed_sequence.packed_sequence_size=128"]].concat());
    assert!(packed.stdout.contains("=== packed row 0: 2 samples"), "{}", packed.stdout);
}

#[test]
fn inspect_counts_in_json() {
    let place = Place::with_model();
    place.write("chat.jsonl", CHAT);
    let outcome =
        place.run(&["data", "inspect", "--data", "chat.jsonl", "--model", "model", "--json", "--rows", "1"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let json: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((json["samples_counted"].as_u64(), json["complete"].as_bool()), (Some(2), Some(true)));
    let sample = &json["samples"][0];
    let learned = sample["labels"].as_array().unwrap().iter().filter(|label| label.as_i64() != Some(-100));
    assert_eq!(learned.count() as u64 + 8, json["label_tokens"].as_u64().unwrap(), "the second row learns 8");
    assert_eq!(json["samples"].as_array().unwrap().len(), 1);
}

#[test]
fn wrong_uses_of_inspect() {
    let place = Place::with_model();
    place.write("odd.jsonl", "{\"body\": 1}\n");
    for (arguments, want) in [
        (&["data", "inspect"][..], "required arguments"),
        (
            &["data", "inspect", "--data", "odd.jsonl", "--model", "model"],
            "odd.jsonl:1: field `(row)`: is of no known form",
        ),
        (&["data", "inspect", "--data", "no.jsonl", "--model", "model"], "cannot read no.jsonl"),
        (&["data", "inspect", "--data", "odd.jsonl", "--model", "model", "--set", "a"], "there is no value"),
    ] {
        let outcome = place.run(arguments);
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        assert!(outcome.stderr.contains(want), "{}", outcome.stderr);
    }
}

#[test]
fn the_schema_is_printed() {
    let outcome = Place::new().run(&["recipe", "schema"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let schema: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert!(schema["properties"]["optimizer"].is_object());
}
