/* Records what a process asks of the disk below one folder, and makes a chosen call fail; loaded by LD_PRELOAD.
 *
 * Every call that changes a file, a name or what is durable goes into a trace, in order, with its bytes. Nothing is
 * flushed in truth: what a power cut would leave is worked out from the trace (recording.py), so fsync costs nothing.
 * A failed fsync is told once, as by Linux since 4.13: what was unsynced then never reaches the disk, although the
 * process goes on seeing it. What is recorded and what fails is shared with forked children: a kill and the process
 * after it are one trace.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { MARK, OPEN, CLOSE, WRITE, TRUNCATE, FSYNC, RENAME, UNLINK, LINK, MKDIR, KINDS };
enum how { FAIL_EIO, FAIL_ENOSPC, SHORT, SHORT_THEN_ENOSPC, KILL };
enum { ANY = -1 };

struct head {
    uint8_t kind, failed;
    uint16_t path_length;
    uint32_t length;
    int32_t fd, flags;
    uint64_t offset, call; /* call: its number among those that can be made to fail; 0: a mark, or close */
};

static struct shared {
    char folder[PATH_MAX];
    int trace;
    uint64_t calls;
    /* Calls of kind `victim` from number `first` on fail as `how` says, `left` times; then all is well again.
     * KILL: the process ends before the call, as by kill -9. */
    uint64_t first, left;
    int victim, how;
} *shared;

#define MOST_FDS 4096
static uint8_t watched[MOST_FDS];
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real_##name())
#define FIND(name)                                                                                                     \
    static void *real_##name(void) {                                                                                   \
        static void *found;                                                                                            \
        return found ? found : (found = dlsym(RTLD_NEXT, #name));                                                      \
    }
FIND(open) FIND(openat) FIND(close) FIND(write) FIND(writev) FIND(pwrite) FIND(ftruncate) FIND(fsync) FIND(rename)
FIND(unlink) FIND(link) FIND(mkdir) FIND(sendfile)

/* What the test says. */

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->trace = -1;
}

/* From now on: what happens below `folder` goes to the file `trace`; an empty folder ends it. */
void recorder_begin(const char *folder, const char *trace) {
    if (shared->trace >= 0)
        REAL(close)(shared->trace);
    shared->trace = *folder ? REAL(open)(trace, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600) : -1;
    strncpy(shared->folder, folder, PATH_MAX - 1);
    shared->calls = shared->first = shared->left = 0;
}

void recorder_arm(uint64_t first, uint64_t times, int victim, int how) {
    shared->first = first, shared->left = times, shared->victim = victim, shared->how = how;
}

uint64_t recorder_calls(void) { return shared->calls; }

uint64_t recorder_left(void) { return shared->left; }

static void note(struct head head, const char *path, const void *data) {
    head.path_length = path ? strlen(path) : 0;
    struct iovec parts[] = {{&head, sizeof head}, {(void *)path, head.path_length}, {(void *)data, head.length}};
    if (shared->trace >= 0 && REAL(writev)(shared->trace, parts, 3) < 0)
        abort();
}

/* Something that the process itself says: who was acknowledged, who has confirmed. */
void recorder_mark(const void *said, uint32_t length) {
    pthread_mutex_lock(&one_at_a_time);
    note((struct head){.kind = MARK, .length = length}, NULL, said);
    pthread_mutex_unlock(&one_at_a_time);
}

/* Where a path lies below the folder; NULL: elsewhere. */
static const char *below(const char *path) {
    size_t length = strlen(shared->folder);
    if (shared->trace < 0 || !path || strncmp(path, shared->folder, length))
        return NULL;
    if (!path[length])
        return "";
    return path[length] == '/' ? path + length + 1 : NULL;
}

static int is_watched(int fd) { return shared && shared->trace >= 0 && fd >= 0 && fd < MOST_FDS && watched[fd]; }

/* Numbers a call and says whether it fails, and as what; to be called with the lock held. */
static int fails(int kind, uint64_t *call) {
    *call = ++shared->calls;
    if ((kind != shared->victim && shared->victim != ANY) || *call < shared->first || !shared->left)
        return -1;
    shared->left--;
    if (shared->how == KILL)
        _exit(137);
    return shared->how;
}

static int error_of(int how) { return how == FAIL_ENOSPC ? ENOSPC : EIO; }

/* A call on names: done under the lock, so that the trace has the order in which things happened. */
#define ON_NAMES(kind_, path_, fd_, flags_, data_, length_, real_)                                                     \
    pthread_mutex_lock(&one_at_a_time);                                                                                \
    struct head head = {.kind = kind_, .fd = fd_, .flags = flags_, .length = length_};                                 \
    int how = fails(kind_, &head.call), result = -1;                                                                   \
    if (how >= 0)                                                                                                      \
        errno = error_of(how);                                                                                         \
    else                                                                                                               \
        result = real_;                                                                                                \
    int error = errno;                                                                                                 \
    head.failed = how >= 0;

#define END_ON_NAMES(path_, data_)                                                                                     \
    if (how >= 0 || result >= 0)                                                                                       \
        note(head, path_, data_);                                                                                      \
    pthread_mutex_unlock(&one_at_a_time);                                                                              \
    errno = error;                                                                                                     \
    return result;

static int opened(const char *path, const char *inside, int flags, mode_t mode) {
    ON_NAMES(OPEN, inside, -1, flags, NULL, 0, REAL(open)(path, flags, mode))
    if (result >= MOST_FDS)
        abort();
    if (result >= 0)
        watched[result] = 1;
    head.fd = result;
    END_ON_NAMES(inside, NULL)
}

static int open_(int at, const char *path, int flags, mode_t mode) {
    const char *inside = shared && path[0] == '/' ? below(path) : NULL;
    if (inside)
        return opened(path, inside, flags, mode);
    return at == AT_FDCWD ? REAL(open)(path, flags, mode) : REAL(openat)(at, path, flags, mode);
}

#define MODE_OF(flags, mode)                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

int open(const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_(AT_FDCWD, path, flags, mode);
}

int openat(int at, const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_(at, path, flags, mode);
}

int creat(const char *path, mode_t mode) { return open_(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd) {
    if (!is_watched(fd))
        return REAL(close)(fd);
    pthread_mutex_lock(&one_at_a_time);
    watched[fd] = 0;
    note((struct head){.kind = CLOSE, .fd = fd}, NULL, NULL);
    int result = REAL(close)(fd);
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

static ssize_t written(int fd, const void *data, size_t length, off_t offset, int moves) {
    pthread_mutex_lock(&one_at_a_time);
    struct head head = {.kind = WRITE, .fd = fd};
    int how = fails(WRITE, &head.call);
    ssize_t result = -1;
    if (how == SHORT || how == SHORT_THEN_ENOSPC) {
        length = length > 1 ? length / 2 : length;
        if (how == SHORT_THEN_ENOSPC && shared->left)
            shared->how = FAIL_ENOSPC;
    }
    if (how == FAIL_EIO || how == FAIL_ENOSPC) {
        head.failed = 1;
        errno = error_of(how);
    } else {
        if (moves)
            offset = fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
        result = moves ? REAL(write)(fd, data, length) : REAL(pwrite)(fd, data, length, offset);
    }
    int error = errno;
    head.offset = offset;
    head.length = result > 0 ? result : 0;
    if (head.failed || result >= 0)
        note(head, NULL, data);
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return result;
}

ssize_t write(int fd, const void *data, size_t length) {
    return is_watched(fd) ? written(fd, data, length, 0, 1) : REAL(write)(fd, data, length);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    return is_watched(fd) ? written(fd, data, length, offset, 0) : REAL(pwrite)(fd, data, length, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return pwrite(fd, data, length, offset); }

/* One part at a time: whoever writes in parts must bear a short write anyway. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!is_watched(fd))
        return REAL(writev)(fd, parts, count);
    while (count > 1 && !parts->iov_len)
        parts++, count--;
    return count ? write(fd, parts->iov_base, parts->iov_len) : 0;
}

/* Callers fall back on write. */
ssize_t sendfile(int to, int from, off_t *offset, size_t count) {
    if (is_watched(to))
        return errno = EINVAL, -1;
    return REAL(sendfile)(to, from, offset, count);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t count) { return sendfile(to, from, offset, count); }

int ftruncate(int fd, off_t length) {
    if (!is_watched(fd))
        return REAL(ftruncate)(fd, length);
    ON_NAMES(TRUNCATE, NULL, fd, 0, NULL, 0, REAL(ftruncate)(fd, length))
    head.offset = length;
    END_ON_NAMES(NULL, NULL)
}

int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int fsync(int fd) {
    if (!is_watched(fd))
        return REAL(fsync)(fd);
    ON_NAMES(FSYNC, NULL, fd, 0, NULL, 0, 0)
    END_ON_NAMES(NULL, NULL)
}

int fdatasync(int fd) { return fsync(fd); }

/* Both paths in one, with a line's end between them. */
#define TWO_PATHS(both, from, to)                                                                                      \
    char both[2 * PATH_MAX];                                                                                           \
    strcpy(stpcpy(stpcpy(both, from), "\n"), to);

int rename(const char *from, const char *to) {
    const char *a = shared ? below(from) : NULL, *b = a ? below(to) : NULL;
    if (!a || !b)
        return REAL(rename)(from, to);
    TWO_PATHS(both, a, b)
    ON_NAMES(RENAME, both, -1, 0, NULL, 0, REAL(rename)(from, to))
    END_ON_NAMES(both, NULL)
}

int link(const char *from, const char *to) {
    const char *a = shared ? below(from) : NULL, *b = a ? below(to) : NULL;
    if (!a || !b)
        return REAL(link)(from, to);
    TWO_PATHS(both, a, b)
    ON_NAMES(LINK, both, -1, 0, NULL, 0, REAL(link)(from, to))
    END_ON_NAMES(both, NULL)
}

int unlink(const char *path) {
    const char *inside = shared ? below(path) : NULL;
    if (!inside)
        return REAL(unlink)(path);
    ON_NAMES(UNLINK, inside, -1, 0, NULL, 0, REAL(unlink)(path))
    END_ON_NAMES(inside, NULL)
}

int mkdir(const char *path, mode_t mode) {
    const char *inside = shared ? below(path) : NULL;
    if (!inside)
        return REAL(mkdir)(path, mode);
    ON_NAMES(MKDIR, inside, -1, 0, NULL, 0, REAL(mkdir)(path, mode))
    END_ON_NAMES(inside, NULL)
}
