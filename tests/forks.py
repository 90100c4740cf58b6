"""A process that has the libraries loaded and forks the command line from there: each call is a process of its own, but
does not spend 15 seconds on imports. Requests and answers are JSON, one a line, on its stdin and stdout."""

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback


def run(code, arguments, folder, env, out, err):
    "What `python -c code arguments` does, in a fresh fork; never returns."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR may be another one now
    for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        file = os.open(path, flags | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(fd, "w", buffering=1, encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv, status = ["-c", *arguments], 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finish(status)


def finish(status):
    import atexit
    import threading

    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


LOADED = "ftnb.certify ftnb.cli ftnb.curve ftnb.decide ftnb.endpoint ftnb.launch ftnb.report ftnb.sweep"
LOADED += " cleanlab.filter detect_secrets matplotlib.pyplot phonenumbers py3langid rich.console scipy.stats"
LOADED += " sklearn.feature_extraction.text sklearn.linear_model sklearn.model_selection"


def main():
    for name in LOADED.split():
        with contextlib.suppress(ImportError):  # then the command line says what is missing
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collector then leaves the shared pages alone
    ends, answers = {}, os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid = asked["poll"]
            if pid not in ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[pid] = os.waitstatus_to_exitcode(status)
            answers.write(json.dumps({"code": ends.get(pid)}) + "\n")
            continue
        if (pid := os.fork()) == 0:
            answers.close()
            run(**asked)
        answers.write(json.dumps({"pid": pid}) + "\n")


if __name__ == "__main__":
    main()
