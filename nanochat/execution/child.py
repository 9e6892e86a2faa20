"""The far side of execution.py: a process that gives up its rights for good, then runs a program.

Started as `python -I execution_child.py REPORT_FD MEMORY_BYTES CPU_SECONDS`, with the program on stdin, in
the directory that it may write to. No permission is needed, neither root's nor a container's, as a process
may always take rights from itself:

    rlimits     CPU time, size of a file, open files, no core dump                     POSIX
                memory                                                                 Linux
    Landlock    reads only Python and system libraries, writes only the directory      Linux 5.13
                no signal to others, no abstract socket of theirs                      Linux 6.12
    seccomp     no other process, no socket, no signal and no ptrace to a neighbour,   Linux, x86-64 and arm64
                no change to a file's owner, mode or times
    no caps     a program that root runs is root in name only                          Linux

The program is one process that can start no other, so that ending it ends everything. Where there is no
seccomp, RLIMIT_NPROC sees to that (threads are then forbidden too), though not for root.

What goes to REPORT_FD: a line that names the protections that this system lacks, and at the program's end
"ok", or "error" or "memory" and the text of the exception.
"""

import ctypes
import linecache
import os
import resource
import struct
import sys
import traceback
import types

PROGRAM = "program.py"  # what tracebacks call it
FILE_BYTES = 16 << 20
OPEN_FILES = 64
RESERVE_BYTES = 16 << 20  # of addresses, to report with when the program has used up its own
NO_MEMORY_LIMIT = "a limit on memory"
NO_LANDLOCK = "a bound on the files that they reach"
NO_SECCOMP = "a wall against network and neighbours"

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, SECCOMP_MODE_FILTER = 9, 2

# <linux/landlock.h>; these system calls have the same numbers on every machine
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
N_RIGHTS = (13, 14, 15, 15, 16)  # that version 1, 2, ... knows for files; versions after 5 added none
WRITE_FILE, READ_FILE, READ_DIR = 2, 4, 8
SCOPES, FIRST_WITH_SCOPES = 3, 6  # abstract Unix sockets and signals, from that version on
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")

# <linux/seccomp.h>: instructions, what they can load, what they can return
LOAD, AND, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, UNKNOWN = 0x7FFF0000, 0x00050000 + 1, 0x00050000 + 38  # EPERM, ENOSYS

# system calls, by their numbers on (x86-64, arm64), which has fewer of the old ones
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
FORBIDDEN = (
    ((57, 58, 272, 308), (97, 268)),  # fork, vfork, unshare, setns
    ((41,), (198,)),  # socket; asyncio needs socketpair, which is judged by its arguments
    ((129, 200, 297, 424, 434), (138, 130, 240, 424, 434)),  # queued signals, tkill, pidfds
    ((101, 298, 310, 311, 312), (117, 241, 270, 271, 272)),  # ptrace, perf, memory of other processes, kcmp
    ((141, 142, 144, 203, 251, 314), (140, 118, 119, 122, 30, 274)),  # priorities and affinities
    ((*range(29, 32), *range(64, 72), 220), tuple(range(186, 198))),  # System V: memory, semaphores, queues
    ((240, 319), (180, 279)),  # queues of POSIX, memfd
    ((248, 249, 250, 321, 323, 425), (217, 218, 219, 280, 282, 425)),  # keys, bpf, userfaultfd, io_uring
    ((90, 91, 92, 93, 94, 260, 268, 452), (52, 53, 54, 55, 452)),  # chmod, chown
    ((132, 235, 261, 280), (88,)),  # times of a file
    ((188, 189, 190, 197, 198, 199), (5, 6, 7, 14, 15, 16)),  # extended attributes
    ((76, 285), (45, 47)),  # truncate by path; fallocate, which fills a disk at once
)
CLONE3, OPENAT2 = 435, 437  # a filter cannot see their flags; the C library then takes clone and openat
FIRST_UNREAD = 453  # later system calls, and those of x86's x32, do not exist for the program

# what a system call is judged by: its numbers, an argument, the bits of it that count (of the lower 32, which
# are all that the kernel takes of these), their value, and whether they must have it or must not
MUST, MUST_NOT = (1, 0), (0, 1)  # instructions to skip: the next one refuses
KILL, TGKILL, SOCKETPAIR, PRCTL = (62, 129), (234, 131), (53, 199), (157, 167)
FCNTL, IOCTL, OPENAT = (72, 25), (16, 29), (257, 56)
OPEN = (2, 0xFFFFFFFF)  # there is none on arm64
WHOLE, CLONE_THREAD, AF_UNIX, SOCK_STREAM, SOCK_TYPE = 0xFFFFFFFF, 0x10000, 1, 1, 0xF
O_ACCMODE, O_TRUNC = 3, 0x200
BY_ARGUMENT = (
    ((56, 220), 0, CLONE_THREAD, CLONE_THREAD, MUST),  # clone
    ((302, 261), 0, WHOLE, 0, MUST),  # prlimit: of this process
    (SOCKETPAIR, 0, WHOLE, AF_UNIX, MUST),
    (SOCKETPAIR, 1, SOCK_TYPE, SOCK_STREAM, MUST),  # datagrams could be sent to any socket
    (PRCTL, 0, WHOLE, PR_SET_PDEATHSIG, MUST_NOT),
    # F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP: who gets a signal when there is something to read
    *((FCNTL, 1, WHOLE, command, MUST_NOT) for command in (8, 10, 15)),
    *((IOCTL, 1, WHOLE, command, MUST_NOT) for command in (0x8901, 0x8902)),
    # to open for neither reading nor writing, and before Linux 6.2 to truncate, takes no right of Landlock's
    *((*call, O_ACCMODE, 3, MUST_NOT) for call in ((OPEN, 1), (OPENAT, 2))),
    *((*call, O_ACCMODE | O_TRUNC, O_TRUNC, MUST_NOT) for call in ((OPEN, 1), (OPENAT, 2))),
)


def main(report_fd: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Confine this process for good and run the program that stdin holds."""
    os.set_inheritable(report_fd, False)
    source = sys.stdin.buffer.read()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    missing = confine(memory_bytes + RESERVE_BYTES, cpu_seconds)
    with open(os.__file__):  # raises if root's Python lies in a home that root in name only cannot enter
        os.write(report_fd, f"{', '.join(missing)}\n".encode())

    reserve = bytearray(RESERVE_BYTES)  # never touched: addresses only
    sys.argv[:] = [PROGRAM]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    try:
        text = source.decode("utf-8", "surrogatepass")
        linecache.cache[PROGRAM] = (len(text), None, text.splitlines(keepends=True), PROGRAM)
        exec(compile(text, PROGRAM, "exec"), module.__dict__)  # noqa: S102 (all of the above is for this)
    except BaseException as error:  # noqa: BLE001 (SystemExit too: a program ends well at its end only)
        del reserve
        status = "memory" if isinstance(error, MemoryError) else "error"
        os.write(report_fd, f"{status} {describe(error)}"[:1000].encode("ascii", "backslashreplace"))
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next), file=sys.__stderr__)
        sys.exit(1)
    os.write(report_fd, b"ok")


def describe(error: BaseException) -> str:
    """Return the kind of an exception and its text, which the program may have made to fail."""
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # noqa: BLE001
        return f"{type(error).__name__}: <exception str() failed>"


def confine(memory_bytes: int, cpu_seconds: int) -> list[str]:
    """Give up what a program does not need; return what this system cannot take away."""
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_CPU, cpu_seconds)
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    if sys.platform != "linux":
        lower(resource.RLIMIT_NPROC, 0)
        return [NO_MEMORY_LIMIT, NO_LANDLOCK, NO_SECCOMP]
    lower(resource.RLIMIT_AS, memory_bytes)
    libc = ctypes.CDLL(None)
    call(libc.prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # nobody is left to keep the time
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = []
    if not confine_files(libc):
        missing.append(NO_LANDLOCK)
    drop_capabilities(libc)
    if not confine_calls(libc):
        missing.append(NO_SECCOMP)
        lower(resource.RLIMIT_NPROC, 0)
    return missing


def lower(limit: int, value: int) -> None:
    """Set a limit of this process, unless it is lower already."""
    _, most = resource.getrlimit(limit)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))


def call(function, *arguments: int) -> int:
    """Call a C function of machine words: ctypes would pass the variadic ones as 32 bits."""
    return function(*map(ctypes.c_long, arguments))


def confine_files(libc: ctypes.CDLL) -> bool:
    """Read only Python and the system's libraries, write only the working directory. False: no Landlock."""
    version = call(libc.syscall, CREATE_RULESET, 0, 0, 1)
    if version < 1:
        return False
    everything = (1 << N_RIGHTS[min(version, len(N_RIGHTS)) - 1]) - 1
    scopes = SCOPES if version >= FIRST_WITH_SCOPES else 0
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", everything, 0, scopes), 24)
    ruleset = call(libc.syscall, CREATE_RULESET, ctypes.addressof(attributes), 24, 0)
    rights = dict.fromkeys((sys.prefix, sys.base_prefix, *READABLE), READ_FILE | READ_DIR)
    rights |= {os.devnull: READ_FILE | WRITE_FILE, os.curdir: everything}
    for path in filter(os.path.exists, rights):
        right = rights[path] if os.path.isdir(path) else rights[path] & ~READ_DIR
        fd = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", right, fd), 12)
        call(libc.syscall, ADD_RULE, ruleset, 1, ctypes.addressof(rule), 0)
        os.close(fd)
    is_confined = call(libc.syscall, RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_confined


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up every privilege that root has over others; NO_NEW_PRIVS keeps them from coming back."""
    version_3 = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    libc.capset(version_3, ctypes.create_string_buffer(24))


def confine_calls(libc: ctypes.CDLL) -> bool:
    """Refuse the system calls that reach beyond this process and its open files. False: no seccomp here."""
    if os.uname().machine not in MACHINES:
        return False
    column, machine = MACHINES[os.uname().machine]
    program = [
        *(instruction(LOAD, MACHINE), instruction(IF_EQUAL, machine, 1, 0), instruction(RETURN, REFUSE)),
        instruction(LOAD, NUMBER),
        *(instruction(IF_AT_LEAST, FIRST_UNREAD, 0, 1), instruction(RETURN, UNKNOWN)),
        *(instruction(IF_EQUAL, CLONE3, 1, 0), instruction(IF_EQUAL, OPENAT2, 0, 1)),
        instruction(RETURN, UNKNOWN),
    ]
    for group in FORBIDDEN:
        for number in group[column]:
            program += [instruction(IF_EQUAL, number, 0, 1), instruction(RETURN, REFUSE)]
    to_itself = ((KILL, 0, WHOLE, os.getpid(), MUST), (TGKILL, 0, WHOLE, os.getpid(), MUST))
    for numbers, argument, mask, value, skips in BY_ARGUMENT + to_itself:
        program += [
            *(instruction(LOAD, NUMBER), instruction(IF_EQUAL, numbers[column], 0, 4)),
            *(instruction(LOAD, FIRST_ARGUMENT + 8 * argument), instruction(AND, mask)),
            *(instruction(IF_EQUAL, value, *skips), instruction(RETURN, REFUSE)),
        ]
    program.append(instruction(RETURN, ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)), 16)
    return call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0) == 0


def instruction(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    """Pack one instruction of a filter; a test skips that many of those that follow."""
    return struct.pack("=HBBI", code, skip_if_true, skip_if_false, value)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
