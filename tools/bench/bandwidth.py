"""How fast threads can read memory: the bound that decoding is held against.

    python tools/bench/bandwidth.py --threads 2

Every thread reads its own part of a buffer far larger than any cache, over and over, with a loop in C that the
machine's own compiler makes (`cc -O3 -march=native`), once on huge pages, if the kernel gives them, and once on
ordinary ones, which most programs get. Without a compiler numpy's `max` reads it instead, which is slower. The best of
all tries counts: noise can only slow a read down.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZE = 1 << 30  # bytes
SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
typedef uint64_t block __attribute__((vector_size(64)));
static char *buffer;
static size_t part;
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
static void *work(void *index) {
  const block *p = (const block *)(buffer + (size_t)index * part), *end = p + part / sizeof(block);
  block a = {0}, b = {0}, c = {0}, d = {0};
  for (; p < end; p += 4) { a ^= p[0]; b ^= p[1]; c ^= p[2]; d ^= p[3]; }
  a ^= b ^ c ^ d;
  volatile uint64_t sink = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
  (void)sink;
  return 0;
}
int main(int count, char **arguments) {
  size_t size = strtoull(arguments[1], 0, 10);
  long threads = atol(arguments[2]), tries = atol(arguments[3]);
  part = size / threads / 256 * 256;
  buffer = aligned_alloc(1 << 21, size);
  madvise(buffer, size, atol(arguments[4]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(buffer, 1, size);
  for (long r = 0; r < tries; r++) {
    pthread_t ids[1024];
    double start = now();
    for (long i = 0; i < threads; i++) pthread_create(&ids[i], 0, work, (void *)i);
    for (long i = 0; i < threads; i++) pthread_join(ids[i], 0);
    printf("%.6e\n", part * threads / (now() - start));
  }
}
"""


def compiled_reads(threads: int, tries: int) -> dict[str, list[float]] | None:
    """Bytes a second of every try, by pages; None when nothing here compiles it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch) / "read.c", Path(scratch) / "read"
        source.write_text(SOURCE)
        command = [compiler, "-O3", "-march=native", "-Wno-psabi", "-pthread", str(source), "-o", str(program)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        found = {}
        for pages, huge in (("huge pages", "1"), ("ordinary pages", "0")):
            run = [program, str(SIZE), str(threads), str(tries), huge]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            found[pages] = [float(line) for line in done.stdout.split()]
    return found


def numpy_reads(threads: int, tries: int) -> list[float]:
    """The same by numpy, which lets go of the interpreter while it reads."""
    parts = np.array_split(np.ones(SIZE // 8, np.int64), threads)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(tries):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            found.append(SIZE / (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tries", type=int, default=20)
    options = parser.parse_args()
    found = compiled_reads(options.threads, options.tries)
    how = "a loop in C" if found else "numpy's max"
    found = found or {"ordinary pages": numpy_reads(options.threads, options.tries)}
    print(json.dumps({"how": how, "threads": options.threads, "bytes_per_second": found}))


if __name__ == "__main__":
    main()
