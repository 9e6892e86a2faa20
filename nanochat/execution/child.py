"""The child process of the sandbox: drop all rights permanently, then run a program.

Started as `python -I child.py REPORT_FD MEMORY_BYTES CPU_SECONDS`, with the program on stdin and the writable
directory as working directory. It needs no privileges, also in a container: a process may always restrict
itself.

    rlimits     CPU time, size of a file, open files, no core dump                     POSIX
                memory                                                                 Linux
    Landlock    reads only Python and system libraries, writes only the directory      Linux 5.13
                no signals to other processes, no access to their abstract sockets     Linux 6.12
    seccomp     no new processes, no sockets, no signals or ptrace to other processes, Linux, x86-64 and arm64
                no changes of a file's owner, mode or times
    capset      no capabilities, even if started by root                               Linux

The program is a single process and cannot start others, so killing it leaves nothing behind. Without seccomp,
RLIMIT_NPROC enforces this (and forbids threads too), though not for root.

The child writes to REPORT_FD a line with the protections that this system lacks and, at the end of the
program, "ok", or "error" or "memory" with the exception.
"""

import ctypes
import linecache
import os
import resource
import struct
import sys
import traceback
import types

PROGRAM = "program.py"  # the file name in tracebacks
FILE_BYTES = 16 << 20
OPEN_FILES = 64
RESERVE_BYTES = 16 << 20  # address space for the report after the program has used up its own
NO_MEMORY_LIMIT = "a memory limit"
NO_LANDLOCK = "restricted file access"
NO_SECCOMP = "isolation from the network and other processes"

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, SECCOMP_MODE_FILTER = 9, 2

# <linux/landlock.h>; the numbers of these system calls are the same on all machines
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
N_RIGHTS = (13, 14, 15, 15, 16)  # file access rights of version 1, 2, ...; none were added after 5
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8
SCOPES, FIRST_WITH_SCOPES = 3, 6  # scopes (abstract Unix sockets, signals), and the version that adds them
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")

# <linux/seccomp.h>: instructions, offsets of the data they load, return values
LOAD, AND, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, DENY, UNKNOWN = 0x7FFF0000, 0x00050000 + 1, 0x00050000 + 38  # DENY: EPERM, UNKNOWN: ENOSYS

# Numbers of system calls on (x86-64, arm64); arm64 lacks some of the old ones.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
FORBIDDEN = (
    ((57, 58, 272, 308), (97, 268)),  # fork, vfork, unshare, setns
    ((41,), (198,)),  # socket; asyncio needs socketpair, see ARGUMENT_RULES
    ((129, 200, 297, 424, 434), (138, 130, 240, 424, 434)),  # queued signals, tkill, pidfd
    ((101, 298, 310, 311, 312), (117, 241, 270, 271, 272)),  # ptrace, perf, memory of other processes, kcmp
    ((141, 142, 144, 203, 251, 314), (140, 118, 119, 122, 30, 274)),  # priorities and affinities
    ((*range(29, 32), *range(64, 72), 220), tuple(range(186, 198))),  # System V: memory, semaphores, queues
    ((240, 319), (180, 279)),  # POSIX queues, memfd
    ((248, 249, 250, 321, 323, 425), (217, 218, 219, 280, 282, 425)),  # keys, bpf, userfaultfd, io_uring
    ((90, 91, 92, 93, 94, 260, 268, 452), (52, 53, 54, 55, 452)),  # chmod, chown
    ((132, 235, 261, 280), (88,)),  # file times
    ((188, 189, 190, 197, 198, 199), (5, 6, 7, 14, 15, 16)),  # extended attributes
    ((76, 285), (45, 47)),  # truncate by path; fallocate, which fills a disk instantly
)
CLONE3, OPENAT2 = 435, 437  # a filter cannot read their flags; the C library falls back to clone, openat
FIRST_UNREVIEWED = 453  # ENOSYS from this number on, which includes the x32 calls of x86-64

# Rules on arguments: numbers of the system call, index of the argument, mask of the bits to compare (of the
# lower 32, which are all that the kernel reads), value, and whether the bits must or must not equal it.
REQUIRE, FORBID = (1, 0), (0, 1)  # instructions to skip; the next one denies the call
KILL, TGKILL, SOCKETPAIR, PRCTL = (62, 129), (234, 131), (53, 199), (157, 167)
FCNTL, IOCTL, OPENAT = (72, 25), (16, 29), (257, 56)
OPEN = (2, 0xFFFFFFFF)  # not on arm64
ALL_BITS, CLONE_THREAD, AF_UNIX, SOCK_STREAM, SOCK_TYPE = 0xFFFFFFFF, 0x10000, 1, 1, 0xF
O_ACCMODE, O_TRUNC = 3, 0x200
ARGUMENT_RULES: tuple[tuple[tuple[int, int], int, int, int, tuple[int, int]], ...] = (
    ((56, 220), 0, CLONE_THREAD, CLONE_THREAD, REQUIRE),  # clone
    ((302, 261), 0, ALL_BITS, 0, REQUIRE),  # prlimit: only of the process itself
    (SOCKETPAIR, 0, ALL_BITS, AF_UNIX, REQUIRE),
    (SOCKETPAIR, 1, SOCK_TYPE, SOCK_STREAM, REQUIRE),  # a datagram socket could send to any socket
    (PRCTL, 0, ALL_BITS, PR_SET_PDEATHSIG, FORBID),
    # F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP select the process that is signaled on input
    *((FCNTL, 1, ALL_BITS, command, FORBID) for command in (8, 10, 15)),
    *((IOCTL, 1, ALL_BITS, command, FORBID) for command in (0x8901, 0x8902)),
    # Landlock does not check access mode 3 (neither reading nor writing) nor, before Linux 6.2, O_TRUNC
    *((numbers, i, O_ACCMODE, 3, FORBID) for numbers, i in ((OPEN, 1), (OPENAT, 2))),
    *((numbers, i, O_ACCMODE | O_TRUNC, O_TRUNC, FORBID) for numbers, i in ((OPEN, 1), (OPENAT, 2))),
)


def main(report_fd: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Confine this process permanently and run the program on stdin."""
    os.set_inheritable(report_fd, False)
    source = sys.stdin.buffer.read()
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), 0)
    missing = confine(memory_bytes + RESERVE_BYTES, cpu_seconds)
    with open(os.__file__):  # raises if Python is in a home that root, without capabilities, cannot enter
        os.write(report_fd, f"{', '.join(missing)}\n".encode())

    reserve = bytearray(RESERVE_BYTES)  # never written: takes address space only
    sys.argv[:] = [PROGRAM]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    try:
        text = source.decode("utf-8", "surrogatepass")
        linecache.cache[PROGRAM] = (len(text), None, text.splitlines(keepends=True), PROGRAM)
        exec(compile(text, PROGRAM, "exec"), module.__dict__)  # noqa: S102 (the purpose of this file)
    except BaseException as error:  # noqa: BLE001 (includes SystemExit: an early exit is a failure)
        del reserve
        status = "memory" if isinstance(error, MemoryError) else "error"
        os.write(report_fd, f"{status} {describe(error)}"[:1000].encode("ascii", "backslashreplace"))
        inner = error.__traceback__ and error.__traceback__.tb_next  # without this function's own frame
        traceback.print_exception(error.with_traceback(inner), file=sys.__stderr__)
        sys.exit(1)
    os.write(report_fd, b"ok")


def describe(error: BaseException) -> str:
    """Return the type and the text of an exception, whose __str__ may fail."""
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # noqa: BLE001
        return f"{type(error).__name__}: <exception str() failed>"


def confine(memory_bytes: int, cpu_seconds: int) -> list[str]:
    """Drop the rights that a program does not need; return the protections that this system lacks."""
    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_CPU, cpu_seconds)
    lower_limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower_limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if sys.platform != "linux":
        lower_limit(resource.RLIMIT_NPROC, 0)
        return [NO_MEMORY_LIMIT, NO_LANDLOCK, NO_SECCOMP]
    lower_limit(resource.RLIMIT_AS, memory_bytes)
    libc = ctypes.CDLL(None)
    # if the parent dies, no one enforces the timeout: die with it
    c_call(libc.prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    c_call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = []
    if not confine_files(libc):
        missing.append(NO_LANDLOCK)
    drop_capabilities(libc)
    if not confine_calls(libc):
        missing.append(NO_SECCOMP)
        lower_limit(resource.RLIMIT_NPROC, 0)
    return missing


def lower_limit(limit: int, value: int) -> None:
    """Set the soft and hard limit of this process to `value`, or keep a lower hard limit."""
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def c_call(function, *arguments: int) -> int:
    """Call a variadic C function with machine words; by default ctypes would pass integers as 32 bits."""
    return function(*map(ctypes.c_long, arguments))


def confine_files(libc: ctypes.CDLL) -> bool:
    """Restrict reads to Python and system libraries, writes to the working directory.

    Return False if the kernel has no Landlock.
    """
    version = c_call(libc.syscall, CREATE_RULESET, 0, 0, 1)
    if version < 1:
        return False
    all_rights = (1 << N_RIGHTS[min(version, len(N_RIGHTS)) - 1]) - 1
    scopes = SCOPES if version >= FIRST_WITH_SCOPES else 0
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", all_rights, 0, scopes), 24)
    ruleset = c_call(libc.syscall, CREATE_RULESET, ctypes.addressof(attributes), 24, 0)
    rights = dict.fromkeys((sys.prefix, sys.base_prefix, *READABLE), READ_FILE | READ_DIR)
    rights |= {os.devnull: READ_FILE | WRITE_FILE, os.curdir: all_rights}
    for path in filter(os.path.exists, rights):
        right = rights[path] if os.path.isdir(path) else rights[path] & ~READ_DIR
        fd = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", right, fd), 12)
        c_call(libc.syscall, ADD_RULE, ruleset, 1, ctypes.addressof(rule), 0)
        os.close(fd)
    is_confined = c_call(libc.syscall, RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_confined


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop all capabilities; NO_NEW_PRIVS prevents regaining them."""
    version_3 = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    libc.capset(version_3, ctypes.create_string_buffer(24))


def confine_calls(libc: ctypes.CDLL) -> bool:
    """Deny the system calls that reach beyond this process and its open files.

    Return False if the kernel has no seccomp, or this machine no table of system calls.
    """
    if os.uname().machine not in MACHINES:
        return False
    column, machine = MACHINES[os.uname().machine]
    program = [
        *(instruction(LOAD, MACHINE), instruction(IF_EQUAL, machine, 1, 0), instruction(RETURN, DENY)),
        instruction(LOAD, NUMBER),
        *(instruction(IF_AT_LEAST, FIRST_UNREVIEWED, 0, 1), instruction(RETURN, UNKNOWN)),
        *(instruction(IF_EQUAL, CLONE3, 1, 0), instruction(IF_EQUAL, OPENAT2, 0, 1)),
        instruction(RETURN, UNKNOWN),
    ]
    for group in FORBIDDEN:
        for number in group[column]:
            program += [instruction(IF_EQUAL, number, 0, 1), instruction(RETURN, DENY)]
    own_process_only = (
        (KILL, 0, ALL_BITS, os.getpid(), REQUIRE),
        (TGKILL, 0, ALL_BITS, os.getpid(), REQUIRE),
    )
    for numbers, argument, mask, value, skips in ARGUMENT_RULES + own_process_only:
        program += [
            *(instruction(LOAD, NUMBER), instruction(IF_EQUAL, numbers[column], 0, 4)),
            *(instruction(LOAD, FIRST_ARGUMENT + 8 * argument), instruction(AND, mask)),
            *(instruction(IF_EQUAL, value, *skips), instruction(RETURN, DENY)),
        ]
    program.append(instruction(RETURN, ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)), 16)
    return c_call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0) == 0


def instruction(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    """Pack an instruction of the filter; a test skips that many of the next instructions."""
    return struct.pack("=HBBI", code, skip_if_true, skip_if_false, value)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
