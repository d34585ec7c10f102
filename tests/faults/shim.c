/* Makes one call of a process fail, or ends the process there, where the call changes files below a folder.
 *
 * For LD_PRELOAD, so that calls of every library are seen, not only those of Python; commands.py compiles and arms it.
 * A failing or fatal write has written half of its bytes before, as on a full disk or in a power cut.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, MKDIR, KINDS };

static char folder[4096];
static int kinds, place, error; /* error 0: SIGKILL */
static int lasting, jump; /* seconds that the clock is ahead once `place` is reached */
static atomic_int seen[KINDS];

/* From now on counts calls below a folder. Of the kinds in `which`, bits, the one at `at`, from 1, fails; or all later
 * ones too. */
void shim_arm(const char *below, int which, int at, int number, int stays, int seconds) {
    snprintf(folder, sizeof folder, "%s/", below);
    kinds = which, place = at, error = number, lasting = stays, jump = seconds;
    for (int kind = 0; kind < KINDS; kind++) atomic_store(&seen[kind], 0);
}

int shim_seen(int kind) { return atomic_load(&seen[kind]); }

static int all(void) { /* calls of the kinds that count */
    int sum = 0;
    for (int kind = 0; kind < KINDS; kind++) sum += kinds >> kind & 1 ? shim_seen(kind) : 0;
    return sum;
}

static int strikes(int kind, const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    atomic_fetch_add(&seen[kind], 1);
    int number = all();
    if (!(kinds >> kind & 1)) return 0;
    if (jump || !place || number < place || (number > place && !lasting)) return 0;
    if (!error && kind != WRITE) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

static const char *named(int file, char *space) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, space, 4095);
    if (size < 0) return NULL;
    space[size] = 0;
    return space;
}

static const char *joined(int from, const char *path, char *space) {
    if (from == AT_FDCWD || path[0] == '/' || !named(from, space)) return path;
    size_t size = strlen(space);
    snprintf(space + size, 8192 - size, "/%s", path);
    return space;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPENS(name)                                                                          \
    int name(const char *path, int flags, ...) {                                             \
        va_list rest;                                                                        \
        va_start(rest, flags);                                                               \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;                  \
        va_end(rest);                                                                        \
        REAL(int, name, const char *, int, ...);                                             \
        return flags & (O_WRONLY | O_RDWR | O_CREAT) && strikes(OPEN, path) ? -1 : real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                       \
    int name(int from, const char *path, int flags, ...) {                                   \
        char space[8192];                                                                    \
        va_list rest;                                                                        \
        va_start(rest, flags);                                                               \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;                  \
        va_end(rest);                                                                        \
        REAL(int, name, int, const char *, int, ...);                                        \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && strikes(OPEN, joined(from, path, space))) return -1; \
        return real(from, path, flags, mode);                                                \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int file, const void *data, size_t size) {
    char space[8192];
    REAL(ssize_t, write, int, const void *, size_t);
    if (!folder[0] || !strikes(WRITE, named(file, space))) return real(file, data, size);
    real(file, data, size / 2);
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return -1;
}

#define WRITES_AT(name)                                                                      \
    ssize_t name(int file, const void *data, size_t size, off_t at) {                        \
        char space[8192];                                                                    \
        REAL(ssize_t, name, int, const void *, size_t, off_t);                               \
        if (!folder[0] || !strikes(WRITE, named(file, space))) return real(file, data, size, at); \
        real(file, data, size / 2, at);                                                      \
        if (!error) kill(getpid(), SIGKILL);                                                 \
        errno = error;                                                                       \
        return -1;                                                                           \
    }
WRITES_AT(pwrite)
WRITES_AT(pwrite64)

#define SYNCS(name)                                                                          \
    int name(int file) {                                                                     \
        char space[8192];                                                                    \
        REAL(int, name, int);                                                                \
        return folder[0] && strikes(FSYNC, named(file, space)) ? -1 : real(file);                \
    }
SYNCS(fsync)
SYNCS(fdatasync)

int rename(const char *old, const char *new) {
    REAL(int, rename, const char *, const char *);
    return strikes(RENAME, new) ? -1 : real(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
    char space[8192];
    REAL(int, renameat, int, const char *, int, const char *);
    return strikes(RENAME, joined(to, new, space)) ? -1 : real(from, old, to, new);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return strikes(MKDIR, path) ? -1 : real(path, mode);
}

int mkdirat(int from, const char *path, mode_t mode) {
    char space[8192];
    REAL(int, mkdirat, int, const char *, mode_t);
    return strikes(MKDIR, joined(from, path, space)) ? -1 : real(from, path, mode);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int code = real(clock, now);
    if (jump && clock == CLOCK_REALTIME && all() >= place) now->tv_sec += jump;
    return code;
}
