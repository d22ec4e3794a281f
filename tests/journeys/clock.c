/* A clock in a test's hand, for a process that has this preloaded: FIELDPOST_CLOCK names a file with two numbers,
   the milliseconds by which CLOCK_REALTIME is wrong, and whether the kernel calls it synchronised. Others are true. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

static long long hand(int *synced)
{
    long long wrong_ms = 0;
    FILE *file = fopen(getenv("FIELDPOST_CLOCK"), "re");
    if (file) {
        if (fscanf(file, "%lld %d", &wrong_ms, synced) != 2)
            wrong_ms = 0;
        fclose(file);
    }
    return wrong_ms;
}

int clock_gettime(clockid_t which, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, which, now), synced;
    if (result == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) {
        long long ns = now->tv_sec * 1000000000LL + now->tv_nsec + hand(&synced) * 1000000LL;
        now->tv_sec = ns / 1000000000LL;
        now->tv_nsec = ns % 1000000000LL;
    }
    return result;
}

time_t time(time_t *told)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told)
        *told = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

int adjtimex(struct timex *state)
{
    int synced = 0;
    (void)state;
    hand(&synced);
    return synced ? TIME_OK : TIME_ERROR;
}
