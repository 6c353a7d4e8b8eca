/* Fault injection: count every operation of this process that changes files below one folder, and kill the process or
 * fail the operation at a chosen one.
 *
 * Wrapping libc's functions would miss much: stdio writes from inside libc, and Rust crates rename by a bare system
 * call (safetensors' save_file does). So a seccomp filter traps the system calls themselves. The SIGSYS handler below
 * then decides, and makes the call with MAGIC as its unused sixth argument, which the filter lets pass.
 *
 * Limits: stores through a shared mapping are not seen; copy_file_range, pwritev2 and io_uring answer as on a kernel
 * that lacks them, so that callers take their usual way around; children of the armed process are not counted; a
 * statically linked program started by it dies of SIGSYS (a dynamic one inherits this library and runs on).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define AUDIT_ARCH_HERE AUDIT_ARCH_X86_64
static const int argument_registers[6] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
#define ARGUMENT(context, i) ((context)->uc_mcontext.gregs[argument_registers[i]])
#define RESULT(context) ((context)->uc_mcontext.gregs[REG_RAX])
#elif defined(__aarch64__)
#define AUDIT_ARCH_HERE AUDIT_ARCH_AARCH64
#define ARGUMENT(context, i) ((context)->uc_mcontext.regs[i])
#define RESULT(context) ((context)->uc_mcontext.regs[0])
#else
#error "no fault injection for this processor"
#endif

#define MAGIC 0x5fa17ed0c0ffee11L
#define OPEN_CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define NONE (-1)
#define HERE (-2) /* the path is relative to the working folder */

enum mode { COUNT, KILL_BEFORE, KILL_AFTER, TORN, ENOSPC_ON, EIO_ONCE, SHORT_THEN_ENOSPC };

/* What a full disk does to an operation: frees and syncs still work, an open works unless it creates. */
enum effect { WRITES, GROWS, OPENS, SYNCS, FREES };

struct rule {
    int number;
    const char *name;
    enum effect effect;
    int dirfd, path;   /* argument indices; path NONE: the file is the descriptor in `dirfd` */
    int dirfd2, path2; /* the second name of a rename or link */
    int extra;         /* WRITES: index of the byte count (or iovec count); OPENS: index of the flags */
};

#define ON_FD(call, effect, extra) {SYS_##call, #call, effect, 0, NONE, NONE, NONE, extra}
#define ON_PATH(call, effect, path, extra) {SYS_##call, #call, effect, HERE, path, NONE, NONE, extra}
#define AT_PATH(call, effect, dirfd, extra) {SYS_##call, #call, effect, dirfd, (dirfd) + 1, NONE, NONE, extra}
#define TWO_AT(call) {SYS_##call, #call, GROWS, 2, 3, 0, 1, NONE}

static const struct rule rules[] = {
    ON_FD(write, WRITES, 2), ON_FD(pwrite64, WRITES, 2), ON_FD(writev, WRITES, 2), ON_FD(pwritev, WRITES, 2),
    ON_FD(sendfile, WRITES, 3), ON_FD(ftruncate, GROWS, NONE), ON_FD(fallocate, GROWS, NONE),
    ON_FD(fsync, SYNCS, NONE), ON_FD(fdatasync, SYNCS, NONE), ON_FD(sync_file_range, SYNCS, NONE),
    ON_FD(fchmod, SYNCS, NONE), ON_FD(fchown, SYNCS, NONE), ON_FD(fsetxattr, GROWS, NONE),
    ON_PATH(truncate, GROWS, 0, NONE), ON_PATH(setxattr, GROWS, 0, NONE), AT_PATH(fchmodat, SYNCS, 0, NONE),
    AT_PATH(fchownat, SYNCS, 0, NONE), AT_PATH(utimensat, SYNCS, 0, NONE), AT_PATH(openat, OPENS, 0, 2),
    AT_PATH(openat2, OPENS, 0, 2), AT_PATH(unlinkat, FREES, 0, NONE), AT_PATH(mkdirat, GROWS, 0, NONE),
    AT_PATH(mknodat, GROWS, 0, NONE), AT_PATH(symlinkat, GROWS, 1, NONE), TWO_AT(renameat2), TWO_AT(linkat),
#ifdef SYS_renameat
    TWO_AT(renameat),
#endif
#ifdef SYS_open /* the older calls, which newer processors never had */
    ON_PATH(open, OPENS, 0, 1), ON_PATH(creat, OPENS, 0, NONE), ON_PATH(unlink, FREES, 0, NONE),
    ON_PATH(rmdir, FREES, 0, NONE), ON_PATH(mkdir, GROWS, 0, NONE), ON_PATH(mknod, GROWS, 0, NONE),
    ON_PATH(symlink, GROWS, 1, NONE), ON_PATH(chmod, SYNCS, 0, NONE), ON_PATH(chown, SYNCS, 0, NONE),
    {SYS_rename, "rename", GROWS, HERE, 1, HERE, 0, NONE}, {SYS_link, "link", GROWS, HERE, 1, HERE, 0, NONE},
#endif
};
#define RULES (sizeof rules / sizeof rules[0])

static struct {
    char prefix[PATH_MAX];
    size_t length;
    long at;
    enum mode mode;
    pid_t owner; /* 0: not armed */
    int log;
    atomic_long count;
    atomic_int full;
} state = {.log = -1};

static long pass(long number, const long *a) {
    long result = syscall(number, a[0], a[1], a[2], a[3], a[4], MAGIC);
    return result == -1 ? -errno : result;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int path_of_fd(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length > 0 ? length : 0] = 0;
    return length > 0;
}

/* The absolute name that `path` would create or change: its folder resolved by the kernel, its last part as given. */
static int resolve(int dirfd, const char *path, char *out) {
    if (!path || !*path) return dirfd != AT_FDCWD && path_of_fd(dirfd, out);
    char folder[PATH_MAX];
    size_t length = strnlen(path, PATH_MAX - 1);
    while (length > 1 && path[length - 1] == '/') length--;
    size_t start = length;
    while (start > 0 && path[start - 1] != '/') start--;
    size_t last = length - start;
    int dots = last > 0 && last <= 2 && !strncmp(path + start, "..", last);
    size_t kept = dots ? length : start;
    memcpy(folder, path, kept);
    folder[kept] = 0;
    int fd = openat(dirfd, kept ? folder : ".", O_PATH | O_CLOEXEC);
    if (fd < 0) return 0;
    int found = path_of_fd(fd, out);
    close(fd);
    size_t used = strlen(out);
    if (!found || dots) return found;
    if (used == 1) used = 0; /* the root folder */
    return snprintf(out + used, PATH_MAX - used, "/%.*s", (int)last, path + start) < (int)(PATH_MAX - used);
}

static int below_prefix(const char *path) {
    return !strncmp(path, state.prefix, state.length) && (path[state.length] == '/' || !path[state.length]);
}

static int locate(int dirfd, int path, const long *a, char *out) {
    if (path == NONE) return path_of_fd((int)a[dirfd], out);
    return resolve(dirfd == HERE ? AT_FDCWD : (int)a[dirfd], (const char *)a[path], out);
}

static void note(long index, const struct rule *rule, const char *path, const char *other) {
    if (state.log < 0) return;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", index, rule->name, path, other);
    for (int i = 0; i < length - 1; i++) /* a name may hold a line break; the three tabs are ours */
        if (line[i] > 0 && line[i] < ' ' && line[i] != '\t') line[i] = '?';
    long a[6] = {state.log, (long)line, length};
    pass(SYS_write, a);
}

/* Makes the write with half of its bytes; 0 when that is none, so that nothing was written. */
static long write_half(const struct rule *rule, const long *a) {
    long changed[6];
    memcpy(changed, a, sizeof changed);
    if (rule->number != SYS_writev && rule->number != SYS_pwritev) {
        changed[rule->extra] = (unsigned long)a[rule->extra] / 2;
        return changed[rule->extra] ? pass(rule->number, changed) : 0;
    }
    const struct iovec *parts = (const struct iovec *)a[1];
    struct iovec copy[IOV_MAX];
    size_t total = 0, used = 0;
    for (long i = 0; i < a[2] && i < IOV_MAX; i++) total += parts[i].iov_len;
    for (size_t left = total / 2; left; used++) {
        copy[used] = parts[used];
        if (copy[used].iov_len > left) copy[used].iov_len = left;
        left -= copy[used].iov_len;
    }
    changed[1] = (long)copy, changed[2] = (long)used;
    return used ? pass(rule->number, changed) : 0;
}

static int needs_space(const struct rule *rule, const long *a, const char *path) {
    if (rule->effect != OPENS) return rule->effect == WRITES || rule->effect == GROWS;
    long flags = rule->extra == NONE ? O_CREAT : a[rule->extra];
    if (rule->number == SYS_openat2) flags = (long)*(const uint64_t *)a[2];
    return (flags & O_TMPFILE) == O_TMPFILE || ((flags & O_CREAT) && access(path, F_OK) != 0);
}

static long at_the_chosen_one(const struct rule *rule, const long *a) {
    enum mode mode = state.mode;
    if (mode == COUNT) return pass(rule->number, a);
    if (mode == EIO_ONCE) return -EIO;
    if (mode == KILL_AFTER) pass(rule->number, a);
    if (mode == TORN && rule->effect == WRITES) write_half(rule, a);
    if (mode == KILL_BEFORE || mode == KILL_AFTER || mode == TORN) die();
    if (rule->effect == FREES) return pass(rule->number, a);
    long written = mode == SHORT_THEN_ENOSPC && rule->effect == WRITES ? write_half(rule, a) : 0;
    return written ? written : -ENOSPC;
}

static long serve(const struct rule *rule, const long *a) {
    char path[PATH_MAX], other[PATH_MAX];
    path[0] = other[0] = 0;
    if (!state.owner || state.owner != getpid()) return pass(rule->number, a);
    int counted = locate(rule->dirfd, rule->path, a, path) && below_prefix(path);
    if (rule->path2 != NONE) counted |= locate(rule->dirfd2, rule->path2, a, other) && below_prefix(other);
    if (!counted) return pass(rule->number, a);
    long index = atomic_fetch_add(&state.count, 1) + 1;
    note(index, rule, path, other);
    if (atomic_load(&state.full) && needs_space(rule, a, path)) return -ENOSPC;
    if (index != state.at) return pass(rule->number, a);
    if (state.mode == ENOSPC_ON || state.mode == SHORT_THEN_ENOSPC) atomic_store(&state.full, 1);
    return at_the_chosen_one(rule, a);
}

static void on_sigsys(__attribute__((unused)) int number, siginfo_t *info, void *raw_context) {
    ucontext_t *context = raw_context;
    int saved = errno;
    long a[6];
    for (int i = 0; i < 6; i++) a[i] = (long)ARGUMENT(context, i);
    long result = -ENOSYS;
    for (size_t i = 0; i < RULES; i++)
        if (rules[i].number == info->si_syscall) result = serve(&rules[i], a);
    RESULT(context) = result;
    errno = saved;
}

/* Trap the calls of the table; opens only when they change something, as the flags tell. */
static int install_filter(void) {
    struct sock_filter code[5 * RULES + 32];
    size_t used = 0, jumps[RULES], jump_count = 0;
#define EMIT(...) (code[used++] = (struct sock_filter)__VA_ARGS__)
#define LOAD_AT(offset) EMIT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(offset)))
#define LOAD(field) LOAD_AT(offsetof(struct seccomp_data, field))
#define UNLESS_EQUAL(value, skip) EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), 0, skip))
#define ANSWER(action) EMIT(BPF_STMT(BPF_RET | BPF_K, action))
    LOAD(arch);
    EMIT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_HERE, 1, 0));
    ANSWER(SECCOMP_RET_ALLOW);
    LOAD(nr);
    const int refused[3][2] = {{SYS_copy_file_range, EXDEV}, {SYS_pwritev2, ENOSYS}, {SYS_io_uring_setup, ENOSYS}};
    for (int i = 0; i < 3; i++) {
        UNLESS_EQUAL(refused[i][0], 1);
        ANSWER(SECCOMP_RET_ERRNO | (uint32_t)refused[i][1]);
    }
    for (size_t i = 0; i < RULES; i++) {
        int by_flags = rules[i].effect == OPENS && rules[i].extra != NONE && rules[i].number != SYS_openat2;
        UNLESS_EQUAL(rules[i].number, by_flags ? 4 : 1);
        if (by_flags) {
            LOAD(args[rules[i].extra]);
            EMIT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, OPEN_CHANGES, 1, 0));
            ANSWER(SECCOMP_RET_ALLOW);
        }
        jumps[jump_count++] = used;
        EMIT(BPF_STMT(BPF_JMP | BPF_JA, 0));
    }
    ANSWER(SECCOMP_RET_ALLOW);
    for (size_t i = 0; i < jump_count; i++) code[jumps[i]].k = (uint32_t)(used - jumps[i] - 1);
    LOAD(args[5]); /* its low half, then its high half: both processors are little-endian */
    UNLESS_EQUAL(MAGIC & 0xffffffff, 3);
    LOAD_AT(offsetof(struct seccomp_data, args[5]) + 4);
    UNLESS_EQUAL(MAGIC >> 32, 1);
    ANSWER(SECCOMP_RET_ALLOW);
    ANSWER(SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = (unsigned short)used, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -errno; /* without it only root may install a filter */
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? -errno : 0;
}

/* A thread may block all signals (Python's sharer of descriptors does); blocked, the trap would kill the process. */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) {
    int (*real)(int, const sigset_t *, sigset_t *) = dlsym(RTLD_NEXT, "pthread_sigmask");
    sigset_t kept;
    if (set && how != SIG_UNBLOCK) {
        kept = *set;
        sigdelset(&kept, SIGSYS);
        set = &kept;
    }
    return real(how, set, old);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    sigaction(SIGSYS, &action, NULL);
}

/* 0, or minus the error number: this kernel or sandbox refuses the filter. `prefix` is absolute; `n` counts from 1. */
int faults_arm(const char *prefix, long n, int mode) {
    static int installed;
    if (strlen(prefix) >= PATH_MAX) return -ENAMETOOLONG;
    if (!realpath(prefix, state.prefix)) strcpy(state.prefix, prefix); /* the run may create it */
    state.length = strlen(state.prefix);
    state.at = n;
    state.mode = (enum mode)mode;
    atomic_store(&state.full, 0);
    atomic_store(&state.count, 0);
    int failed = installed ? 0 : install_filter();
    installed |= !failed;
    state.owner = failed ? 0 : getpid();
    return failed;
}

long faults_count(void) { return atomic_load(&state.count); }
void faults_disarm(void) { state.owner = 0; }
/* From now on one line per counted operation: index, name, path and, for renames and links, the other path; by tabs. */
int faults_log(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return -errno;
    state.log = fcntl(fd, F_DUPFD_CLOEXEC, 500); /* high, so that the program's own descriptors keep their numbers */
    close(fd);
    return state.log < 0 ? -errno : 0;
}
