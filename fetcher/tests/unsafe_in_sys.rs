// SPDX-License-Identifier: Apache-2.0
//! `unsafe` stands in modules called `sys` and nowhere else, in every crate: the lint that denies it can be
//! switched off by any module, so what switches it off is looked for.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::path::{Path, PathBuf};

/// This file, whose examples are what it looks for.
const ME: &str = "unsafe_in_sys.rs";

/// Where the workspace is.
fn workspace() -> PathBuf {
    let me = Path::new(env!("CARGO_MANIFEST_DIR"));
    me.parent().unwrap().into()
}

/// All Rust files below a directory.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") && name != ME {
            found.push(path);
        }
    }
}

/// Whether a file belongs to a crate's module `sys`.
fn is_sys(path: &Path) -> bool {
    let path = path.to_string_lossy();
    path.ends_with("/src/sys.rs") || path.contains("/src/sys/")
}

/// What a file outside of `sys` does that it may not.
fn offence(text: &str) -> Option<&'static str> {
    let lines = text.lines().map(str::trim_start);
    let code: Vec<&str> = lines.filter(|line| !line.starts_with("//")).collect();
    let code = code.join("\n");
    let forbids = code.matches("forbid(unsafe_code)").count();
    if code.matches("unsafe_code").count() > forbids {
        return Some("it touches the lint");
    }
    let uses = ["{", "fn ", "impl ", "extern ", "trait "].map(|what| format!("unsafe {what}"));
    let uses = uses.iter().any(|it| code.contains(it)) || code.contains("unsafe(");
    uses.then_some("it has unsafe code")
}

#[test]
fn unsafe_is_in_sys_only() {
    let mut found = Vec::new();
    sources(&workspace(), &mut found);
    let mut in_sys = 0;
    for path in &found {
        let text = std::fs::read_to_string(path).unwrap();
        if is_sys(path) {
            in_sys += usize::from(text.contains("unsafe {"));
        } else {
            assert_eq!(offence(&text), None, "{}", path.display());
        }
    }
    // The search finds what there is.
    assert!(found.len() > 300 && in_sys > 3, "{} {in_sys}", found.len());
}

#[test]
fn every_crate_has_the_workspaces_lints() {
    let workspace = workspace();
    let manifest = std::fs::read_to_string(workspace.join("Cargo.toml")).unwrap();
    for lint in ["unsafe_code", "undocumented_unsafe_blocks"] {
        assert!(
            manifest.contains(&format!("\n{lint} = \"deny\"\n")),
            "{lint}"
        );
    }
    let mut lines = manifest.lines();
    let members = lines.find_map(|it| it.strip_prefix("members = [")).unwrap();
    let members: Vec<&str> = members.split('"').skip(1).step_by(2).collect();
    assert!(members.len() >= 6, "{members:?}");
    for member in members {
        let path = workspace.join(member).join("Cargo.toml");
        let manifest = std::fs::read_to_string(path).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{member}");
    }
}

#[test]
fn what_is_looked_for_is_found() {
    assert_eq!(
        offence("fn f() { g() }\n// unsafe { }\n//! unsafe_code"),
        None
    );
    assert_eq!(offence("#![forbid(unsafe_code)]"), None);
    assert!(offence("fn f() { unsafe { g() } }").is_some());
    assert!(offence("#![allow(\n    unsafe_code,\n    reason = \"x\"\n)]").is_some());
    assert!(offence("#[expect(unsafe_code)]\nfn f() {}").is_some());
    assert!(is_sys(Path::new("/w/a/src/sys/x.rs")) && is_sys(Path::new("/w/a/src/sys.rs")));
    assert!(!is_sys(Path::new("/w/a/src/system.rs")) && !is_sys(Path::new("/w/sys/a/src/b.rs")));
}
