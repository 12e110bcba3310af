//! Which module may use which.

use std::{collections::BTreeMap, fs, path::Path, sync::LazyLock};

use super::support::ROOT;

/// The level of each module, from the table of docs/architecture.md: a module may use modules of lower levels, and itself.
fn levels() -> &'static BTreeMap<String, u8> {
    static LEVELS: LazyLock<BTreeMap<String, u8>> = LazyLock::new(|| {
        let text = fs::read_to_string(format!("{ROOT}/docs/architecture.md")).unwrap();
        let rows = text.lines().filter_map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            Some((cells.first()?.parse::<u8>().ok()?, cells.get(1)?.to_string()))
        });
        rows.flat_map(|(level, modules)| {
            let names: Vec<String> = modules.split(',').map(|name| name.trim_matches([' ', '`']).to_string()).collect();
            names.into_iter().map(move |name| (name, level))
        })
        .collect()
    });
    &LEVELS
}

fn level(module: &str) -> Option<u8> {
    levels().get(module).copied()
}

/// What `lib.rs` re-exports at the root, by name, with the module it comes from.
fn root_names() -> BTreeMap<String, String> {
    let lib = fs::read_to_string(format!("{ROOT}/src/lib.rs")).unwrap();
    let mut names = BTreeMap::new();
    for statement in lib.split(';').filter_map(|s| s.split("pub use ").nth(1)) {
        let (module, list) = statement.split_once("::").unwrap();
        for item in list.split(',') {
            let name = item.rsplit("::").next().unwrap().trim_matches(|c: char| "{} \n".contains(c));
            names.insert(name.to_string(), module.trim().to_string());
        }
    }
    names
}

/// The first path segments behind every `crate::` of a source, comments and tests left out.
fn uses(source: &str) -> Vec<String> {
    let code: String = source
        .split("#[cfg(test)]")
        .next()
        .unwrap()
        .lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join(" ");
    let mut found = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            found.push(rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_string());
            continue;
        };
        let mut depth = 0;
        let mut item = String::new();
        for c in list.chars() {
            match c {
                '}' if depth == 0 => break,
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => found.push(std::mem::take(&mut item)),
                _ => {}
            }
            if depth == 0 && c != ',' && c != '}' {
                item.push(c);
            }
        }
        found.push(item);
    }
    found.iter().map(|item| item.trim().split("::").next().unwrap().trim().to_string()).filter(|item| !item.is_empty()).collect()
}

fn sources(folder: &Path, out: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let name = path.strip_prefix(format!("{ROOT}/src")).unwrap().to_string_lossy().into_owned();
            out.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

/// Every use that goes up or sideways, as `file uses module`.
fn violations(sources: &[(String, String)]) -> Vec<String> {
    let roots = root_names();
    let mut bad = Vec::new();
    for (file, source) in sources {
        let module = file.split('/').next().unwrap().trim_end_matches(".rs");
        // In a file at the top, `super` is the crate.
        let source = if file.contains('/') { source.clone() } else { source.replace("super::", "crate::") };
        if module == "lib" {
            continue;
        }
        let Some(own) = level(module) else {
            bad.push(format!("{file} is in no level of docs/architecture.md"));
            continue;
        };
        for used in uses(&source) {
            let target = roots.get(&used).cloned().unwrap_or(used);
            match level(&target) {
                None => bad.push(format!("{file} uses `{target}`, which is in no level")),
                Some(other) if target != module && other >= own => {
                    bad.push(format!("{file} (level {own}) uses {target} (level {other})"))
                }
                _ => {}
            }
        }
    }
    bad
}

#[test]
fn no_source_is_longer_than_400_lines() {
    let mut all = Vec::new();
    sources(&Path::new(ROOT).join("src"), &mut all);
    let long: Vec<&String> = all.iter().filter(|(_, text)| text.lines().count() > 400).map(|(name, _)| name).collect();
    assert!(long.is_empty() && all.len() > 30, "split {long:?}: a source longer than this may hold a second concept");
}

#[test]
fn modules_use_only_what_is_below_them() {
    let mut all = Vec::new();
    sources(&Path::new(ROOT).join("src"), &mut all);
    assert!(all.len() > 30, "the sources were found");
    assert!(levels().len() > 8, "the table was found");
    assert_eq!(violations(&all), Vec::<String>::new());
}

#[test]
fn an_import_that_goes_up_is_caught() {
    let file = |name: &str, source: &str| [(name.to_string(), source.to_string())];
    let caught = |name, source| violations(&file(name, source));
    assert_eq!(
        caught("routing/router.rs", "use crate::layer::moe::MoeFeedForward;"),
        ["routing/router.rs (level 2) uses layer (level 3)"]
    );
    assert_eq!(
        caught("loss/a.rs", "use crate::{routing::Routing, stats::RoutingStats};"),
        ["loss/a.rs (level 3) uses stats (level 3)"]
    );
    assert_eq!(caught("ops/a.rs", "fn f() { crate::MoeFeedForward::x() }"), ["ops/a.rs (level 1) uses layer (level 3)"]);
    assert_eq!(caught("attic.rs", ""), ["attic.rs is in no level of docs/architecture.md"]);
    assert!(
        caught("layer/moe.rs", "use crate::{routing::{A, B}, layer::C}; // crate::clip\n#[cfg(test)] use crate::clip;").is_empty()
    );
}

#[test]
fn the_generic_layer_knows_neither_images_nor_upcycling() {
    let mut all = Vec::new();
    sources(&Path::new(ROOT).join("src"), &mut all);
    for (file, source) in
        all.iter().filter(|(file, _)| level(file.split('/').next().unwrap().trim_end_matches(".rs")).is_some_and(|l| l < 4))
    {
        let code: Vec<&str> = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let code = code.join("\n").to_lowercase();
        assert!(!code.contains("image") && !code.contains("upcycle"), "{file} knows of images or of upcycling");
    }
}

/// What may be linked into a user's program without asking anything of them but to keep notices.
/// MPL-2.0 asks only that changes to its own files stay open.
const LICENCES: [&str; 17] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "NCSA",
    "OFL-1.1",
    "Unicode-3.0",
    "Unlicense",
    "WTFPL",
    "Zlib",
];

/// The licence check of every dependency, of all features and platforms.
#[test]
fn every_dependency_may_be_used() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--manifest-path"])
        .arg(format!("{ROOT}/Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    let refused: Vec<String> = packages
        .iter()
        .filter_map(|package| {
            let licence = match package["name"].as_str() {
                // States no expression; its licence file was read.
                Some("cfg_block") => "Apache-2.0",
                _ => package["license"].as_str().unwrap_or("none"),
            };
            let expression = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX);
            let good = expression
                .is_ok_and(|e| e.evaluate(|requirement| requirement.license.id().is_some_and(|id| LICENCES.contains(&id.name))));
            (!good).then(|| format!("{} {}: {licence}", package["name"], package["version"]))
        })
        .collect();
    assert!(refused.is_empty(), "licences to look at: {refused:#?}");
}
