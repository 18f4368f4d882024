// SPDX-License-Identifier: Apache-2.0
//! The second half of the self-test: whether the kernel asks before EROFS reads a marked device, waits
//! for the answer, and shows what was filled in meanwhile or the error that it was answered with.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{DEVICE_BLOCKS, content, failed, sample_tree, shown};
use crate::sys::fanotify::{self, Answer, EventSlots};
use crate::sys::{mountpoint, newmount};
use sluice_blockindex::erofs::BLOCK_BYTES;

/// How long the reader may take. When it is over the group is closed, and the kernel lets him go on.
const DEADLINE: Duration = Duration::from_secs(5);

/// Mounts over devices that hold nothing, and fills one while it is read; the other is refused.
pub(super) fn try_in(scratch: &Path) -> Result<(), String> {
    let at = |name: &str| scratch.join(name);
    fs::create_dir(at("lazy")).map_err(failed("make scratch directory"))?;
    let contents = [1, 2].map(content);
    let group = fanotify::group().map_err(failed("make a group for pre-content events"))?;
    let slots = EventSlots::create(1).map_err(failed("make memory for events"))?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for number in 0..contents.len() {
        let path = at(&format!("sparse{number}"));
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(&path).map_err(failed("make sparse device"))?;
        file.set_len(DEVICE_BLOCKS * BLOCK_BYTES)
            .map_err(failed("make sparse device"))?;
        fanotify::mark(group.as_fd(), &file).map_err(failed("mark a device"))?;
        theirs.push(File::open(&path).map_err(failed("open sparse device"))?);
        ours.push(file);
    }
    let tree = at("lazy.erofs");
    let image = sample_tree().ok_or("build scratch tree")?;
    fs::write(&tree, image).map_err(failed("write scratch tree"))?;
    newmount::erofs(&tree, &theirs, &at("lazy"), newmount::Caching::Both)
        .map_err(|error| error.to_string())?;

    let (done, reader) = channel();
    let mounted = at("lazy");
    let read = move |number: usize| fs::read(mounted.join(format!("directory/file{number}")));
    // He may hang, so nobody waits for him but by the channel.
    std::thread::spawn(move || {
        for number in 0..2 {
            let _gone = done.send(read(number));
        }
    });
    let served = serve(&group, &slots, &ours, &contents[0], &reader);
    drop(group);
    let result = served.and_then(|results| judge(results, &contents[0]));
    let gone = mountpoint::detach(&at("lazy"), true);
    tracing::debug!(?gone, "unmount the self-test's lazy mount");
    result
}

pub(super) type Results = [io::Result<Vec<u8>>; 2];

/// Answers events until both files were read.
fn serve(
    group: &OwnedFd,
    slots: &EventSlots,
    devices: &[File],
    filling: &[u8],
    reader: &Receiver<io::Result<Vec<u8>>>,
) -> Result<Results, String> {
    let (begun, mut results, mut events) = (Instant::now(), Vec::new(), 0);
    while begun.elapsed() < DEADLINE {
        if let Ok(result) = reader.try_recv() {
            results.push(result);
        }
        if results.len() == 2 {
            if events == 0 {
                return Err("no event came: the kernel does not ask before EROFS reads".into());
            }
            return results.try_into().map_err(|_| String::new());
        }
        let mut polls = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
        let _none = poll(&mut polls, PollTimeout::from(5u8));
        if slots
            .receive(group.as_fd(), 0)
            .map_err(failed("read events"))?
        {
            events += 1;
            answer(group, slots, devices, filling).map_err(failed("answer an event"))?;
        }
    }
    Err(format!(
        "a reader was not served within {DEADLINE:?} after {events} events"
    ))
}

/// Fills the range of an event of the first device, a little late; refuses those of the second.
fn answer(group: &OwnedFd, slots: &EventSlots, devices: &[File], filling: &[u8]) -> io::Result<()> {
    let descriptor = slots.take(0);
    let (Some(event), Some(descriptor)) = (slots.event(0), descriptor) else {
        return Err(io::Error::other("an event without a descriptor"));
    };
    let inode = |fd: &dyn AsFd| nix::sys::stat::fstat(fd.as_fd()).map(|stat| stat.st_ino);
    let answer = if inode(&descriptor)? == inode(&devices[0])? {
        std::thread::sleep(Duration::from_millis(2));
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(filling.len());
        let range = place(event.offset)..place(event.offset.saturating_add(event.length));
        // It was opened before it was marked, so this does not ask.
        devices[0].write_all_at(&filling[range], event.offset)?;
        Answer::Allow
    } else {
        Answer::Deny(libc::EIO)
    };
    if !event.asks {
        return Err(io::Error::other("an event without a range"));
    }
    let answered = fanotify::answer(group.as_fd(), event.number, answer);
    slots.clear(0);
    answered
}

pub(super) fn judge(results: Results, filled: &[u8]) -> Result<(), String> {
    let [first, second] = results;
    let read = first.map_err(failed("read from EROFS while its device is filled"))?;
    if read != shown(filled) {
        return Err("EROFS shows other bytes than were filled in".into());
    }
    match second {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
        Err(error) => Err(format!("a refused read fails with another error: {error}")),
        Ok(_) => Err("a refused read gives bytes".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_bytes_after_a_refusal_are_noticed() {
        let filled = content(1);
        let good = || Ok(shown(&filled).to_vec());
        let refused = |errno| Err(io::Error::from_raw_os_error(errno));
        assert_eq!(judge([good(), refused(libc::EIO)], &filled), Ok(()));
        let mut zeros = shown(&filled).to_vec();
        zeros[4096..8192].fill(0);
        assert!(judge([Ok(zeros), refused(libc::EIO)], &filled).is_err());
        assert!(judge([good(), good()], &filled).is_err());
        assert!(judge([good(), refused(libc::ENOMEM)], &filled).is_err());
        assert!(judge([refused(libc::EIO), refused(libc::EIO)], &filled).is_err());
    }
}
