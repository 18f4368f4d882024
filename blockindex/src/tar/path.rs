// SPDX-License-Identifier: Apache-2.0
//! Paths of a tar: cleaned by their letters, then resolved inside the layer's root.
//!
//! containerd cleans an entry's name lexically, resolves the symlinks of its parent inside the root,
//! where `..` stops at the root, and leaves the last component alone. Only symlinks of the same
//! layer count, because containerd unpacks into the layer's own directory.

use crate::tree::{InodeId, InodeKind, Tree};

use super::NotLazy;

/// The most symlinks that one path may cross; containerd gives up at the same number.
const LINKS_MAX: u32 = 255;
/// Longest path in bytes: Linux takes no longer one, so containerd could not unpack it.
pub(super) const PATH_MAX_BYTES: usize = 4095;
/// The most components that one resolution may visit. Reached only by symlinks that expand one
/// another; without it a small tar could keep the scanner busy for hours.
const STEPS_MAX: usize = 16 * 1024;

/// The components of `path` after `.`, empty ones and `..` are taken out by their letters alone.
pub(super) fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop();
            }
            name => components.push(name),
        }
    }
    components
}

/// Length of the path that `components` make, separators included.
pub(super) fn length(components: &[&[u8]]) -> usize {
    components.iter().map(|component| component.len() + 1).sum()
}

/// Follows all symlinks of `components`, the last one included, inside the root of `tree`.
///
/// **Shape**: a component may be `..`, which takes away what was resolved before it. The result has
/// no symlink; it may name what does not exist. **Errors**: among others when more components are
/// visited than `steps_left`, which is what all resolutions of a scan may still visit.
pub(super) fn resolve(
    tree: &Tree,
    components: &[&[u8]],
    steps_left: &mut u64,
) -> Result<Vec<Vec<u8>>, NotLazy> {
    let shown = || super::shown(&components.join(&b'/'));
    let mut pending: Vec<Vec<u8>> = components.iter().rev().map(|c| c.to_vec()).collect();
    let mut done: Vec<(Vec<u8>, Option<InodeId>)> = Vec::new();
    let (mut links, mut steps) = (0, 0);
    while let Some(name) = pending.pop() {
        steps += 1;
        if steps > STEPS_MAX || *steps_left == 0 {
            return Err(NotLazy::TooManyLinks { path: shown() });
        }
        *steps_left -= 1;
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                done.pop();
                continue;
            }
            _ => {}
        }
        let directory = done.last().map_or(Some(tree.root()), |(_, id)| *id);
        let child = directory.and_then(|directory| tree.child(directory, &name));
        let Some(InodeKind::Symlink(target)) = child.map(|id| &tree.inode(id).kind) else {
            done.push((name, child));
            continue;
        };
        links += 1;
        if links > LINKS_MAX {
            return Err(NotLazy::TooManyLinks { path: shown() });
        }
        let mut joined = Vec::new();
        if !target.starts_with(b"/") {
            for (name, _) in &done {
                joined.extend_from_slice(name);
                joined.push(b'/');
            }
        }
        joined.extend_from_slice(target);
        pending.extend(clean(&joined).into_iter().rev().map(<[u8]>::to_vec));
        done.clear();
    }
    let length: usize = done.iter().map(|(name, _)| name.len() + 1).sum();
    if length > PATH_MAX_BYTES {
        return Err(NotLazy::PathTooLong { path: shown() });
    }
    Ok(done.into_iter().map(|(name, _)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Inode;

    fn join(components: &[Vec<u8>]) -> String {
        String::from_utf8(components.join(&b'/')).unwrap()
    }

    #[test]
    fn cleaning_never_leaves_the_root() {
        let cases: [(&[u8], &[u8]); 8] = [
            (b"./a//b/", b"a/b"),
            (b"/a/b", b"a/b"),
            (b"../../a", b"a"),
            (b"a/../../b/./c", b"b/c"),
            (b".", b""),
            (b"", b""),
            (b"a/..", b""),
            (b"...", b"..."),
        ];
        for (path, expected) in cases {
            assert_eq!(clean(path).join(&b'/'), expected);
        }
    }

    #[test]
    fn symlinks_stay_inside_the_root() {
        let mut tree = Tree::new();
        let root = tree.root();
        let usr = tree
            .insert_new(root, b"usr", Inode::implicit_directory())
            .unwrap();
        for (directory, name, target) in [
            (root, "lib", "usr/lib"),
            (root, "abs", "/usr/lib"),
            (root, "out", "../../../etc"),
            (usr, "up", "../x/../y"),
            (root, "loop", "loop"),
            (root, "again", "abs/deep"),
            (root, "here", "."),
        ] {
            let kind = InodeKind::Symlink(target.as_bytes().into());
            tree.insert_new(directory, name.as_bytes(), Inode::new(kind))
                .unwrap();
        }
        for (path, expected) in [
            ("lib/x", "usr/lib/x"),
            ("abs/x", "usr/lib/x"),
            ("out/passwd", "etc/passwd"),
            ("usr/up", "y"),
            ("again", "usr/lib/deep"),
            ("here/here/lib", "usr/lib"),
            ("lib/../a", "usr/a"),
            ("none/../../a", "a"),
        ] {
            let components: Vec<&[u8]> = path.as_bytes().split(|b| *b == b'/').collect();
            assert_eq!(
                join(&resolve(&tree, &components, &mut 1000).unwrap()),
                expected,
                "{path}"
            );
        }
        assert!(matches!(
            resolve(&tree, &[b"loop"], &mut 1000),
            Err(NotLazy::TooManyLinks { .. })
        ));
    }

    #[test]
    fn symlinks_that_expand_one_another_end() {
        let mut tree = Tree::new();
        let root = tree.root();
        let kind = InodeKind::Symlink(b"b/b/b/b/b/b/b/b/b/b/b/b/b/b/b/b/a".to_vec().into());
        tree.insert_new(root, b"a", Inode::new(kind)).unwrap();
        let kind = InodeKind::Symlink(b"./.".to_vec().into());
        tree.insert_new(root, b"b", Inode::new(kind)).unwrap();
        let many = vec![&b"a"[..]; 5000];
        assert!(matches!(
            resolve(&tree, &many, &mut (1 << 20)),
            Err(NotLazy::TooManyLinks { .. })
        ));
        // What one path may visit is little; what all of a tar visit is bounded as well.
        let (once, mut left) = (vec![&b"b"[..]; 10], 25);
        let paths = (0..).take_while(|_| resolve(&tree, &once, &mut left).is_ok());
        assert_eq!((paths.count(), left), (2, 0));
    }
}
