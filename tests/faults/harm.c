/* Stands between the program and its files (LD_PRELOAD), and does harm where the environment says:
 *
 *   HARM_UNDER  only to files whose path contains this
 *   HARM_MODE   count: write the number of operations to HARM_COUNT at each; kill: SIGKILL after operation HARM_AT;
 *               half: write half of it, then SIGKILL; enospc, eio: operation HARM_AT fails, and with HARM_ON=1 all later
 *               ones that need room; slow: an fsync takes 150 ms
 *   HARM_CLOCK  seconds by which the wall clock is wrong once HARM_CLOCK_FILE exists
 *
 * An operation is a mkdir, an open for writing, a write, an fsync, a rename or a deletion. Without HARM_MODE nothing is
 * done; the environment is read each time, since the program is forked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { NOTHING, KILL_AFTER, KILL_HALFWAY, FAIL };

static atomic_int operations;

static int is_mode(const char *name) {
    const char *mode = getenv("HARM_MODE");
    return mode && !strcmp(mode, name);
}

/* What becomes of an operation on this path; `room` says whether it needs room on the disk. */
static int fate(const char *path, int room) {
    const char *under = getenv("HARM_UNDER"), *at = getenv("HARM_AT"), *on = getenv("HARM_ON");
    if (!getenv("HARM_MODE") || !under || !path || !strstr(path, under)) return NOTHING;
    int number = ++operations, due = at ? atoi(at) : -1;
    if (is_mode("count")) {
        FILE *(*open_file)(const char *, const char *) = dlsym(RTLD_NEXT, "fopen");
        FILE *file = open_file(getenv("HARM_COUNT"), "w");
        if (file) { fprintf(file, "%d", number); fclose(file); }
    }
    if (number == due && is_mode("kill")) return KILL_AFTER;
    if (number == due && is_mode("half")) return KILL_HALFWAY;
    if (is_mode("enospc") || is_mode("eio")) {
        if (number == due || (on && *on == '1' && number > due && room)) {
            errno = is_mode("eio") ? EIO : ENOSPC;
            return FAIL;
        }
    }
    return NOTHING;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, 4095);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

#define DO(path, room, call)                                       \
    int become = fate(path, room);                                 \
    if (become == FAIL) return -1;                                 \
    if (become == KILL_HALFWAY) die();                             \
    __typeof__(call) result = call;                                \
    if (become == KILL_AFTER) die();                               \
    return result

int mkdir(const char *path, mode_t mode) { DO(path, 1, NEXT(mkdir)(path, mode)); }
int rename(const char *from, const char *to) { DO(from, 0, NEXT(rename)(from, to)); }
int unlink(const char *path) { DO(path, 0, NEXT(unlink)(path)); }
int rmdir(const char *path) { DO(path, 0, NEXT(rmdir)(path)); }
int unlinkat(int folder, const char *path, int flags) {
    char buffer[4096];
    DO(*path == '/' ? path : path_of(folder, buffer), 0, NEXT(unlinkat)(folder, path, flags));
}

static int opened(int (*next)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    if ((flags & O_ACCMODE) == O_RDONLY) return next(path, flags, mode);
    DO(path, 1, next(path, flags, mode));
}
#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                   \
        va_list rest;                                              \
        va_start(rest, flags);                                     \
        mode_t mode = va_arg(rest, mode_t);                        \
        va_end(rest);                                              \
        return opened(NEXT(name), path, flags, mode);              \
    }
OPEN(open)
OPEN(open64)

int fsync(int descriptor) {
    char buffer[4096];
    const char *path = path_of(descriptor, buffer), *under = getenv("HARM_UNDER");
    if (is_mode("slow") && under && path && strstr(path, under)) usleep(150000);
    DO(path, 1, NEXT(fsync)(descriptor));
}

#define WRITE(name, arguments, whole, half)                        \
    ssize_t name arguments {                                       \
        char buffer[4096];                                         \
        int become = getenv("HARM_MODE") ? fate(path_of(target, buffer), 1) : NOTHING; \
        if (become == FAIL) return -1;                             \
        ssize_t result = become == KILL_HALFWAY ? (half) : (whole); \
        if (become != NOTHING) die();                              \
        return result;                                             \
    }
WRITE(write, (int target, const void *data, size_t size), NEXT(write)(target, data, size),
      NEXT(write)(target, data, size / 2))
WRITE(pwrite64, (int target, const void *data, size_t size, off64_t offset), NEXT(pwrite64)(target, data, size, offset),
      NEXT(pwrite64)(target, data, size / 2, offset))
WRITE(pwrite, (int target, const void *data, size_t size, off_t offset), NEXT(pwrite)(target, data, size, offset),
      NEXT(pwrite)(target, data, size / 2, offset))
WRITE(writev, (int target, const struct iovec *parts, int count), NEXT(writev)(target, parts, count),
      NEXT(writev)(target, parts, (count + 1) / 2))
WRITE(sendfile, (int target, int source, off_t *offset, size_t size), NEXT(sendfile)(target, source, offset, size),
      NEXT(sendfile)(target, source, offset, size / 2))
WRITE(sendfile64, (int target, int source, off64_t *offset, size_t size),
      NEXT(sendfile64)(target, source, offset, size), NEXT(sendfile64)(target, source, offset, size / 2))

static long wrong_by(clockid_t clock) {
    const char *by = getenv("HARM_CLOCK"), *file = getenv("HARM_CLOCK_FILE");
    return clock == CLOCK_REALTIME && by && file && !access(file, F_OK) ? atol(by) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = NEXT(clock_gettime)(clock, now);
    now->tv_sec += wrong_by(clock);
    return result;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
