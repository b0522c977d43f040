/* A small pool of threads that wait passively.
 *
 * The caller takes parts of its work like any helper, so it never waits for a thread that has not begun: a helper that
 * the operating system wakes late finds nothing left. Who has nothing to do, helper or caller, looks for some
 * microseconds before it sleeps: the next linear of a model follows soon, and a helper's last part takes no longer. */
#include "threads.h"

#include "ternarize.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_HELPERS = 255, LOOKS = 64, NANOSECONDS_AWAKE = 30000 };

typedef struct {
    tz_work work;
    void *context;
    int64_t total, grain, least;   /* part of it */
    int threads;
    _Atomic int64_t next;
} job;

static struct {
    pthread_mutex_t taken;         /* held by whose work it is */
    pthread_mutex_t lock;          /* of all below */
    pthread_cond_t begun, left;
    job *job;                      /* NULL while there is none */
    int helpers, seats;
    unsigned round;                /* counts jobs */
    _Atomic int inside;            /* these two are read without the lock: by a caller that waits for its helpers, */
    _Atomic unsigned called;       /* and, when the lock is open again, by helpers that are still awake */
} pool = {
    .taken = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .begun = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

/* A forked child has none of its parent's helpers, and may have copied locks that nobody will open. */
static tz_team _Atomic team;

/* OpenMP does not outlive a fork either. */
static void start_afresh(void) {
    team = NULL;
    pthread_mutex_init(&pool.taken, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.begun, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.job = NULL;
    pool.helpers = pool.seats = pool.inside = 0;
}

static void register_watch(void) { pthread_atfork(NULL, NULL, start_afresh); }

static void watch_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_watch);
}

/* The next part takes half of what would be each thread's: many parts are small, so that all end together, and the
 * first ones large, so that each thread reads on where it was. */
static int64_t part_of(const job *j, int64_t left) {
    const int64_t share = left / (2 * j->threads) / j->grain * j->grain, part = share > j->least ? share : j->least;
    return part < left ? part : left;
}

static void work_on(job *j) {
    int64_t first = atomic_load(&j->next);
    while (first < j->total) {
        const int64_t part = part_of(j, j->total - first);
        if (!atomic_compare_exchange_weak(&j->next, &first, first + part)) continue;
        j->work(j->context, first, first + part);
        first = atomic_load(&j->next);
    }
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Whether there has been a job since that round; and whether all helpers have left theirs. */
static int is_called(unsigned seen) {
    return (int)(atomic_load_explicit(&pool.called, memory_order_relaxed) - seen) > 0;
}

static int is_alone(unsigned unused) {
    (void)unused;
    return !atomic_load_explicit(&pool.inside, memory_order_relaxed);
}

static void look_for(int (*found)(unsigned), unsigned seen) {
    const int64_t until = now() + NANOSECONDS_AWAKE;
    do
        for (int i = 0; i < LOOKS; i++) {
            if (found(seen)) return;
            rest();
        }
    while (now() < until);
}

static void *help(void *unused) {
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.job || pool.round == seen || pool.seats == 0) {
            seen = pool.round;
            pthread_mutex_unlock(&pool.lock);
            look_for(is_called, seen);
            pthread_mutex_lock(&pool.lock);
            if (pool.round == seen) pthread_cond_wait(&pool.begun, &pool.lock);
        }
        job *j = pool.job;
        seen = pool.round;
        pool.seats--;
        pool.inside++;
        pthread_mutex_unlock(&pool.lock);
        work_on(j);
        pthread_mutex_lock(&pool.lock);
        if (--pool.inside == 0) pthread_cond_signal(&pool.left);
    }
    return unused;
}

/* Signals are for the threads of the program, so helpers are born with all of them blocked. */
static void add_helpers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, NULL)) break;
        pthread_detach(thread);
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void share(job *j, int helpers) {
    pthread_mutex_lock(&pool.lock);
    add_helpers(helpers < MOST_HELPERS ? helpers : MOST_HELPERS);
    pool.job = j;
    pool.seats = helpers;
    const unsigned round = ++pool.round;
    pthread_cond_broadcast(&pool.begun);
    pthread_mutex_unlock(&pool.lock);
    atomic_store(&pool.called, round);
    work_on(j);
    look_for(is_alone, round);
    pthread_mutex_lock(&pool.lock);
    pool.job = NULL;
    while (pool.inside > 0) pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

static job divide(tz_work work, void *context, int64_t total, int64_t grain, int threads) {
    const int64_t parts = 16 * (int64_t)threads;              /* so that a thread that is held up delays little */
    return (job){work, context, total, grain, (total / parts / grain + 1) * grain, threads, 0};
}

void tz_run(tz_work work, void *context, int64_t total, int64_t grain, int threads) {
    watch_forks();
    if (threads <= 1 || total <= grain || pthread_mutex_trylock(&pool.taken)) {
        work(context, 0, total);
        return;
    }
    job j = divide(work, context, total, grain, threads);
    share(&j, threads - 1);
    pthread_mutex_unlock(&pool.taken);
}

/* -- OpenMP's threads ----------------------------------------------------------------------------------------------
 *
 * After each of its operations that used several threads, torch's wait for the next one without sleeping. Beside them a
 * pool of ours would have half of the cores, so that where products alternate with torch's operations they take turns
 * on the same threads. */

void tz_set_team(tz_team wanted) {
    watch_forks();
    team = wanted;
}

static void work_in_team(void *j) { work_on(j); }

void tz_run_team(tz_work work, void *context, int64_t total, int64_t grain, int threads) {
    const tz_team parallel = team;
    if (!parallel || threads <= 1 || total <= grain) {
        tz_run(work, context, total, grain, threads);
        return;
    }
    job j = divide(work, context, total, grain, threads);
    parallel(work_in_team, &j, (unsigned)threads, 0);
}
