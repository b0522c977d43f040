/* Work split among threads, at most one piece of work at a time; who finds the pool taken works alone. */
#pragma once

#include <stdint.h>

typedef void (*tz_work)(void *context, int64_t first, int64_t last);

/* Call work(context, first, last) for parts of 0 .. total, each a multiple of `grain`, on up to `threads` threads. */
void tz_run(tz_work work, void *context, int64_t total, int64_t grain, int threads);
