// SPDX-License-Identifier: Apache-2.0
//! What the kernel can do for us.

use super::{Finding, Severity};

/// Name of the check.
pub const CHECK: &str = "kernel";

/// The first release that hands out FUSE requests again after a worker died.
///
/// **Source** fs/fuse/dev.c, `FUSE_NOTIFY_RESEND`.
const RESEND: (u32, u32) = (6, 9);

/// The first release in which EROFS mounts files.
const EROFS_FILES: (u32, u32) = (6, 12);

/// Major and minor release, from `6.18.3-arch1` or the like.
#[must_use]
pub fn parse_release(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether the kernel knows a file system, by `/proc/filesystems`.
fn knows(filesystems: &str, name: &str) -> bool {
    filesystems
        .lines()
        .any(|line| line.split_whitespace().last() == Some(name))
}

/// What the release, the list of file systems, and whether `/dev/fuse` is there, say together.
#[must_use]
pub fn judge(release: &str, filesystems: &str, has_device: bool) -> Vec<Finding> {
    let finding = |severity, subject: &str, problem: &str, advice: &str| {
        Finding::new(CHECK, severity, subject, problem).advice(advice)
    };
    let mut found = Vec::new();
    if !has_device {
        let problem = "is missing: no lazy image can be mounted";
        found.push(finding(
            Severity::Error,
            "/dev/fuse",
            problem,
            "modprobe fuse",
        ));
    }
    for (name, purpose) in [
        ("fuse", "lazy images need it"),
        ("overlay", "containers need it"),
    ] {
        if !knows(filesystems, name) {
            let problem = format!("is not in /proc/filesystems: {purpose}");
            let advice = format!("modprobe {name}; or the kernel is built without it");
            found.push(finding(Severity::Warning, name, &problem, &advice));
        }
    }
    match parse_release(release) {
        None => {
            let problem = "is no release that this program can read";
            found.push(finding(Severity::Info, release, problem, ""));
        }
        Some(known) => {
            if known < RESEND {
                let problem = "does not hand out FUSE requests again: a read that a dying worker had taken is answered from the journal";
                let advice = "keep [mount] journal on, or use Linux 6.9 or later";
                found.push(finding(Severity::Info, release, problem, advice));
            }
            if known >= EROFS_FILES && !knows(filesystems, "erofs") {
                let problem = "is not in /proc/filesystems";
                let advice = "modprobe erofs lets the kernel serve sealed images by itself";
                found.push(finding(Severity::Info, "erofs", problem, advice));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "nodev\tsysfs\nnodev\toverlay\nnodev\tfuse\n\tfuseblk\n\terofs\n\text4\n";

    #[test]
    fn releases_parse_as_distributions_write_them() {
        for (text, expected) in [
            ("6.18.3\n", Some((6, 18))),
            ("5.15.0-105-generic", Some((5, 15))),
            ("6.9-rc1", Some((6, 9))),
            ("6.1.0-18-amd64", Some((6, 1))),
            ("", None),
            ("six", None),
        ] {
            assert_eq!(parse_release(text), expected, "{text}");
        }
    }

    #[test]
    fn a_kernel_is_judged_by_what_it_lacks() {
        let worst = |release: &str, filesystems: &str, device| {
            let found = judge(release, filesystems, device);
            (found.len(), found.into_iter().map(|it| it.severity).max())
        };
        assert_eq!(worst("6.18.0", ALL, true), (0, None));
        assert_eq!(worst("6.18.0", ALL, false), (1, Some(Severity::Error)));
        assert_eq!(worst("6.1.0", ALL, true), (1, Some(Severity::Info)));
        let without = |name: &str| ALL.replace(&format!("\t{name}\n"), "\n");
        assert_eq!(
            worst("6.18.0", &without("overlay"), true),
            (1, Some(Severity::Warning))
        );
        // fuseblk is something else.
        assert_eq!(
            worst("6.18.0", &without("fuse"), true),
            (1, Some(Severity::Warning))
        );
        assert_eq!(
            worst("6.18.0", &without("erofs"), true),
            (1, Some(Severity::Info))
        );
        assert_eq!(worst("6.1.0", &without("erofs"), true).0, 1);
    }
}
