/* Counts the file operations below a folder, and at the n-th kills the process or lets it fail.
 *
 * Preloaded into a process (LD_PRELOAD) by tests/torture/forks.py, which calls faults_arm. An operation is an opened
 * file, a write, a flush, and a change of names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static long count, target;
static int code; /* the error to return; 0: kill */

/* Errors that last, as a full disk does, strike from the n-th operation on, and only where the disk would grow. */
static int lasts(void) { return code == ENOSPC; }

void faults_arm(const char *below, long nth, int error) {
    length = strlen(below);
    memcpy(folder, below, length < PATH_MAX ? length + 1 : 0);
    count = 0, target = nth, code = error;
}

long faults_count(void) { return count; }

static int path_below(const char *path, int base) {
    char start[PATH_MAX] = "", link[64], whole[2 * PATH_MAX];
    if (!length || !path) return 0;
    if (path[0] == '/') return !strncmp(path, folder, length);
    if (base == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", base);
        if (readlink(link, start, sizeof start - 1) < 0) return 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", start, path);
    return !strncmp(whole, folder, length);
}

static int file_below(int file) {
    char link[64], path[PATH_MAX] = "";
    if (!length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    return readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, folder, length);
}

/* Counts an operation; returns 0, or -1 with errno set. */
static int strike(int grows) {
    long now = __sync_add_and_fetch(&count, 1);
    if (!target || (lasts() ? now < target || !grows : now != target)) return 0;
    if (!code) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = code;
    return -1;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, #name))
#define IF_BELOW(below, grows) do { if ((below) && strike(grows)) return -1; } while (0)
#define MODE(flags, last) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, last); mode = va_arg(rest, mode_t); va_end(rest); }

#define OPEN(name) int name(const char *path, int flags, ...) { \
    MODE(flags, flags) IF_BELOW(path_below(path, AT_FDCWD), flags & O_CREAT); \
    return REAL(name, int (*)(const char *, int, ...))(path, flags, mode); }
#define OPENAT(name) int name(int base, const char *path, int flags, ...) { \
    MODE(flags, flags) IF_BELOW(path_below(path, base), flags & O_CREAT); \
    return REAL(name, int (*)(int, const char *, int, ...))(base, path, flags, mode); }
#define ON_FILE(type, name, grows, parameters, ...) type name parameters { \
    IF_BELOW(file_below(file), grows); \
    return REAL(name, type (*) parameters)(__VA_ARGS__); }
#define ON_PATH(name, below, grows, parameters, ...) int name parameters { \
    IF_BELOW(below, grows); \
    return REAL(name, int (*) parameters)(__VA_ARGS__); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_FILE(ssize_t, write, 1, (int file, const void *from, size_t size), file, from, size)
ON_FILE(ssize_t, writev, 1, (int file, const struct iovec *from, int parts), file, from, parts)
ON_FILE(ssize_t, pwrite64, 1, (int file, const void *from, size_t size, off64_t at), file, from, size, at)
ON_FILE(int, ftruncate64, 1, (int file, off64_t size), file, size)
ON_FILE(int, fsync, 0, (int file), file)
ON_PATH(rename, path_below(from, AT_FDCWD) || path_below(to, AT_FDCWD), 0, (const char *from, const char *to), from, to)
ON_PATH(unlink, path_below(path, AT_FDCWD), 0, (const char *path), path)
ON_PATH(unlinkat, path_below(path, base), 0, (int base, const char *path, int flags), base, path, flags)
ON_PATH(rmdir, path_below(path, AT_FDCWD), 0, (const char *path), path)
ON_PATH(mkdir, path_below(path, AT_FDCWD), 1, (const char *path, mode_t mode), path, mode)

/* These return the error instead of setting errno. */
int posix_fallocate64(int file, off64_t at, off64_t size) {
    if (file_below(file) && strike(1)) return errno;
    return REAL(posix_fallocate64, int (*)(int, off64_t, off64_t))(file, at, size);
}
