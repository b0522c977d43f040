/* Work split among threads: those of a pool of our own, at most one piece of work at a time, where who finds the pool
 * taken works alone; or those of the program's OpenMP, whatever it has. */
#pragma once

#include <stdint.h>

typedef void (*tz_work)(void *context, int64_t first, int64_t last);

/* Call work(context, first, last) for parts of 0 .. total, each a multiple of `grain`, on up to `threads` threads. */
void tz_run(tz_work work, void *context, int64_t total, int64_t grain, int threads);

/* The same on OpenMP's threads, where tz_set_team has said how; else on the pool's. */
void tz_run_team(tz_work work, void *context, int64_t total, int64_t grain, int threads);
