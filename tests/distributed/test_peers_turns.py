"""Whatever passes and replays follow each other, no message is written over before it is read, however slow a process.

Two processes' kernels are modelled by what they do with messages (common.cu): a launch counts itself in its mailbox,
sends a message whose flag is the count's lowest bit, and ends when it has read one of that flag. All orders in which
their steps may come are gone through.
"""

import random

import process_groups
import pytest
import torch
import torch.distributed as dist
from test_peers_memory import pretend

pytest.importorskip("triton")

from onlinenorm.ops.fused import peers
from onlinenorm.ops.spec import NormSpec

BARRIER = "barrier"  # as `pretend` names it
PROGRAMS, LENGTH = 60, 12


def goes_well(operations):
    """Whether two processes that launch with these mailboxes, or meet at a barrier, end in every order of their steps.

    A launch has two: it sends, and it reads, which must be what the other process's same launch has sent.
    """
    end = 2 * len(operations)
    todo, seen = [((0, 0), ({}, {}))], set()  # steps done by each, and messages in each one's memory, by mailbox
    while todo:
        done, memory = todo.pop()
        if (state := (done, *(tuple(sorted(part.items())) for part in memory))) in seen:
            continue
        seen.add(state)
        stuck = True
        for own, other in ((0, 1), (1, 0)):
            if done[own] == end:
                continue
            number, reads = divmod(done[own], 2)
            box, after = operations[number], list(memory)
            flag = operations[: number + 1].count(box) % 2
            if box == BARRIER:
                if done[other] < 2 * number:
                    continue
            elif reads:
                flag_there, sent_by = memory[own].get(box, (0, None))
                if flag_there != flag:
                    continue
                if sent_by != number:
                    return False
            else:
                after[other] = {**memory[other], box: (flag, number)}
            steps = list(done)
            steps[own] += 1
            todo.append((tuple(steps), tuple(after)))
            stuck = False
        if stuck and done != (end, end):
            return False
    return True


def test_the_model_tells_turns_that_go_well_from_others():
    assert goes_well(["forward", "backward"] * 3) and goes_well(["forward", BARRIER, "forward", "backward"])
    assert goes_well(["first", "second", "first", "backward", "backward 2", "first"])
    assert not goes_well(["forward", "forward"]) and not goes_well(["forward", "backward", "backward", "forward"])


def programs(rank):
    """Orders of passes and of replays, which take turns, by name and by their mailboxes."""
    _, events = pretend(rank, 2)
    peers.CHUNK = 1 << 24  # for all
    chooser, found = random.Random(5), []

    def launch(number, direction, capturing=False, layers=1):
        torch.cuda.is_current_stream_capturing = lambda: capturing
        events.clear()
        spec = NormSpec(processes=2, mailbox=number, shortcut_mailbox=PROGRAMS + number)
        box = peers.mailbox(spec, direction, 4, 64, torch.device("cuda", rank), layers)
        operations.extend([*events, box.addresses[0]])

    assert peers.serve("", rank)
    for number in range(1, PROGRAMS + 1):
        operations, words, graphs = [], [], []
        directions = ("forward", "backward")[: 2 - (number % 4 == 0)]  # or no backward: a barrier is captured then
        for direction in directions:
            launch(number, direction)
        before = operations
        for direction in directions:
            operations = []
            launch(number, direction, capturing=True)
            graphs.append(operations)
        operations = before
        while len(words) < LENGTH:
            words.append(chooser.choice(["replay", "forward", "backward"]))
            if words[-1] != "replay":
                launch(number, words[-1], layers=chooser.choice((1, 2)))
                continue
            for graph in graphs:
                operations += graph
                if chooser.random() < 0.5:
                    words.append("forward within")
                    launch(number, "forward")
        found.append((words, operations))
    dist.barrier()  # rank 0 serves the store
    dist.destroy_process_group()
    return found


def test_no_order_of_passes_and_replays_loses_a_message():
    found, other = process_groups.run(2, programs)
    assert found == other and len(found) == PROGRAMS
    assert {word for words, _ in found for word in words} == {"replay", "forward", "backward", "forward within"}
    assert any(BARRIER in operations for _, operations in found)
    for words, operations in found:
        assert goes_well(operations), words
