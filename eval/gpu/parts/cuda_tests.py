"""The tests that need a CUDA device."""

from __future__ import annotations

import re
import subprocess
import sys

from common import begin

part = begin(needs_cuda=True)
done = subprocess.run(
    [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "tests"],
    capture_output=True,
    text=True,
    timeout=2 * part.seconds,
    check=False,
)
print(done.stdout, done.stderr)
counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
part.note(tests=counts)
if done.returncode:
    sys.exit(f"pytest ended with exit code {done.returncode}: {counts}")
