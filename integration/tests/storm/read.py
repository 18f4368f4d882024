# SPDX-License-Identifier: Apache-2.0
"""Reads, maps, lists and runs what the image has, in many processes at once, and compares it with
expected.json. Arguments: seconds, processes, seed. Prints one JSON object."""

import hashlib
import json
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import time

EXPECTED = json.load(open("/storm/expected.json"))
FILES = sorted(EXPECTED["files"])
DIRECTORIES = sorted(EXPECTED["directories"])
# What runs and prints the same each time.
PROGRAMS = [
    path
    for path in ("/usr/bin/sha256sum", "/usr/bin/b2sum", "/usr/bin/cksum", "/usr/bin/od")
    if path in EXPECTED["files"]
]


def read(path, chance):
    """Some read all at once, some in odd pieces, backwards."""
    with open(path, "rb") as file:
        if chance.random() < 0.5:
            content = file.read()
        else:
            size, step = EXPECTED["files"][path][0], chance.choice((4096, 65536, 1 << 20))
            pieces = []
            for start in reversed(range(0, size, step)):
                pieces.append(os.pread(file.fileno(), step, start))
            content = b"".join(reversed(pieces))
        # The next read is the file system's again, not the page cache's.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashlib.sha256(content).hexdigest() == EXPECTED["files"][path][1]


def mapped(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        same = hashlib.sha256(content).hexdigest() == EXPECTED["files"][path][1]
        content.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return same


def listed(path):
    return sorted(os.listdir(path)) == EXPECTED["directories"][path]


def stated(path):
    return os.stat(path).st_size == EXPECTED["files"][path][0]


def ran(program, path):
    done = subprocess.run([program, path], capture_output=True, timeout=170)
    digest = EXPECTED["files"][path][1]
    named = program.endswith("/sha256sum")
    return done.returncode == 0 and (not named or done.stdout.decode().startswith(digest))


def work(seconds, seed, results):
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    done, wrong, failed, longest, problems = 0, 0, 0, 0.0, []
    while time.monotonic() < end:
        path, kind = chance.choice(FILES), chance.random()
        begun = time.monotonic()
        try:
            if kind < 0.5:
                same = read(path, chance)
            elif kind < 0.75:
                same = mapped(path)
            elif kind < 0.85:
                path = chance.choice(DIRECTORIES)
                same = listed(path)
            elif kind < 0.95 or not PROGRAMS:
                same = stated(path)
            else:
                same = ran(chance.choice(PROGRAMS), path)
            if not same:
                wrong += 1
                problems.append(f"{path}: other content")
        except Exception as error:
            failed += 1
            problems.append(f"{path}: {error!r}")
        longest = max(longest, time.monotonic() - begun)
        done += 1
    results.put((done, wrong, failed, longest, problems[:5]))


def main():
    seconds, processes, seed = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    results = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=work, args=(seconds, seed * 1000 + number, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    # A reader that was ended by SIGBUS reports nothing: it failed.
    lost = 0
    reports = []
    for worker in workers:
        while worker.is_alive() or not results.empty():
            try:
                reports.append(results.get(timeout=0.2))
            except Exception:
                pass
        worker.join()
    lost = processes - len(reports)
    print(
        json.dumps(
            {
                "operations": sum(it[0] for it in reports),
                "wrong": sum(it[1] for it in reports),
                "failed": sum(it[2] for it in reports) + lost,
                "longest_seconds": round(max((it[3] for it in reports), default=0.0), 3),
                "problems": [problem for it in reports for problem in it[4]][:20],
                "lost": lost,
            }
        )
    )


main()
