//! Which files a recipe means: names, folders, and patterns with `*` and `?`.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// Files of a folder, and of those below it, whose extension is one of `extensions`; the files that match a pattern;
/// a file as it is named. Each in the order of their names.
///
/// # Errors
/// A folder that cannot be read, and a folder or pattern without a file.
pub(crate) fn expand(paths: &[PathBuf], extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        // A file may have a star in its name.
        let found = if path.is_dir() {
            below(path, extensions)?
        } else if !path.exists() && is_pattern(path) {
            matching(path)?
        } else {
            vec![path.clone()]
        };
        if found.is_empty() {
            let what =
                if path.is_dir() { "the folder holds no file that ends in" } else { "matches no file" };
            let message = match path.is_dir() {
                true => format!("{what} {}", extensions.join(", ")),
                false => what.to_owned(),
            };
            return Err(Error::Dataset { path: path.clone(), message });
        }
        files.extend(found);
    }
    Ok(files)
}

fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?'])
}

/// Hidden files and folders, such as those that downloads leave, are passed over.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::Read { path: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(failed)?;
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(failed)?;
    paths.retain(|path| path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.')));
    paths.sort();
    Ok(paths)
}

fn below(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            files.extend(below(&path, extensions)?);
        } else if path.extension().is_some_and(|ext| extensions.iter().any(|wanted| ext == *wanted)) {
            files.push(path);
        }
    }
    Ok(files)
}

fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![PathBuf::new()];
    for component in pattern.components() {
        let Component::Normal(name) = component else {
            found.iter_mut().for_each(|path| path.push(component));
            continue;
        };
        let name = name.to_string_lossy();
        if !name.contains(['*', '?']) {
            found.iter_mut().for_each(|path| path.push(name.as_ref()));
            continue;
        }
        let mut next = Vec::new();
        for folder in found {
            let here = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
            if !here.is_dir() {
                continue;
            }
            for path in entries(here)? {
                let file = path.file_name().unwrap_or_default();
                if matches(&name, &file.to_string_lossy()) {
                    next.push(folder.join(file));
                }
            }
        }
        found = next;
    }
    found.retain(|path| path.is_file());
    Ok(found)
}

/// Whether a name fits a pattern: `*` stands for any characters, `?` for one.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // After the last star: where it stands and how much of the name it has taken.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_patterns_and_lists_give_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("part/deep")).unwrap();
        for name in ["b.jsonl", "a.jsonl", "c.txt", ".hidden.jsonl", "part/d.parquet", "part/deep/e.jsonl"] {
            std::fs::write(root.join(name), "x").unwrap();
        }
        let names = |paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(|path| root.join(path)).collect();
            let found = expand(&paths, &["jsonl", "parquet"]);
            found.map(|found| {
                let strip = |path: &PathBuf| path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                found.iter().map(strip).collect::<Vec<_>>()
            })
        };
        assert_eq!(names(&[""]).unwrap(), ["a.jsonl", "b.jsonl", "part/d.parquet", "part/deep/e.jsonl"]);
        assert_eq!(names(&["c.txt", "*.jsonl"]).unwrap(), ["c.txt", "a.jsonl", "b.jsonl"]);
        assert_eq!(names(&["p*/?.parquet"]).unwrap(), ["part/d.parquet"]);
        assert_eq!(
            names(&["missing.jsonl"]).unwrap(),
            ["missing.jsonl"],
            "opening it says that it is missing"
        );
        assert!(names(&["*.csv"]).unwrap_err().to_string().contains("matches no file"));
        std::fs::create_dir(root.join("empty")).unwrap();
        assert!(names(&["empty"]).unwrap_err().to_string().contains("no file that ends in jsonl, parquet"));
    }

    #[test]
    fn stars_and_question_marks_match() {
        for (pattern, name, fits) in [
            ("*.jsonl", "a.jsonl", true),
            ("*.jsonl", "a.json", false),
            ("train-*-of-*.parquet", "train-00001-of-00004.parquet", true),
            ("*a*b", "aab", true),
            ("*a*b", "aabc", false),
            ("?", "", false),
            ("**", "", true),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
