"""Saves that are killed or run out of disk, and what their folders hold afterwards."""

import os
import resource
import signal
import sys
import time

import torch
from diffusers import UNet2DConditionModel

FILE_EVENTS = ("open", "os.", "shutil.", "ctypes.call_function")  # of Python's audit hooks


def in_another_process(function, prepare):
    """Runs a function in a forked process, which may be killed; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            prepare()
            function()
        finally:
            os._exit(0)
    return process


def at_each_event(action):
    """Has an action called before each file event of this process, with the number of events so far."""
    events = 0

    def count(event, arguments):
        nonlocal events
        if event.startswith(FILE_EVENTS):
            events += 1
            action(events - 1)

    sys.addaudithook(count)


def number_of_events(function):
    """The number of file events of a function."""
    reading, writing = os.pipe()

    def report(number):
        os.write(writing, b".")

    os.waitpid(in_another_process(function, lambda: at_each_event(report)), 0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        return len(pipe.read())


def killed_at_event(function, number):
    """Kills the process before its ``number``-th file event, counted from 0. Returns False if there are fewer."""

    def kill(event):
        if event == number:
            signal.raise_signal(signal.SIGKILL)

    _, status = os.waitpid(in_another_process(function, lambda: at_each_event(kill)), 0)
    return os.WIFSIGNALED(status)


def killed_after(function, seconds):
    """Kills the process after some seconds."""
    process = in_another_process(function, lambda: None)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def with_full_disk(function, largest):
    """Runs a function in a process whose files may have at most ``largest`` bytes."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    os.waitpid(in_another_process(function, prepare), 0)


def loaded_from(folder, **states):
    """The name of the state dict that a folder holds; "refused" if nothing loads, "mixture" if something else does."""
    try:
        found = UNet2DConditionModel.from_pretrained(folder).state_dict()
    except (OSError, ValueError):
        return "refused"
    for name, expected in states.items():
        if found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected):
            return name
    return "mixture"
