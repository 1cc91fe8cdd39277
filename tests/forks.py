"""Runs in processes of their own that may be killed: forked, so that nothing has to be imported again."""
import os
import signal
import sys
import time
import traceback


def fork(f, *args, **kw):
    "Number of a process that calls `f` and ends: with status 0, 1 after an error, or as a `SystemExit` says"
    sys.stdout.flush(); sys.stderr.flush()
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        os.setpgid(0, 0)                               # a group of its own, with its loader's processes
        signal.signal(signal.SIGINT, signal.default_int_handler)
        f(*args, **kw); status = 0
    except SystemExit as e: status = e.code or 0
    except KeyboardInterrupt: status = 130
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)


def wait(pid, seconds=120):
    "The process's status: as `SystemExit`, or minus the signal that ended it; one that does not end in time is killed, and an error"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
    raise AssertionError(f'a process did not end within {seconds} s')


def run_forked(f, *args, **kw): return wait(fork(f, *args, **kw))
