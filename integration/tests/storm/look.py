# SPDX-License-Identifier: Apache-2.0
"""Writes what is below some directories as JSON: digests and sizes of files, names in directories.
Argument: the file to write."""

import hashlib
import json
import os
import sys

TOPS = ("/usr/bin", "/usr/lib/python3.11", "/usr/share", "/etc")

files, directories = {}, {}
for top in TOPS:
    for directory, names, members in os.walk(top):
        directories[directory] = sorted(os.listdir(directory))
        for name in members:
            path = os.path.join(directory, name)
            # Containers have files of their own in /etc.
            if os.path.islink(path) or not os.path.isfile(path) or os.path.ismount(path):
                continue
            with open(path, "rb") as file:
                content = file.read()
            if content and path not in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"):
                files[path] = [len(content), hashlib.sha256(content).hexdigest()]
directories.pop("/etc", None)
with open(sys.argv[1], "w", encoding="utf-8") as out:
    json.dump({"files": files, "directories": directories}, out)
