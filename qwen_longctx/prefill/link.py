"""What the ranks of a pipeline say to each other, and how each of them learns that another one failed.

Tensors go through the process group of the user. Everything else goes through a socket between every two ranks, which
a thread reads: that another process ended is seen by its closed socket at once, and no wait is one that nothing can
end. A rank that waits for a message gets it, or an error within `timeout` seconds.

All ranks make the same calls in the same order, and number them. A call is

1. agreed on: every rank tells all others what it was called with, and all of them go on or none does;
2. worked through: a rank announces a chunk to the next one, which then receives it, and says so;
3. passed: every rank tells all others that its part is done, and only then does any of them commit.

A rank that fails in between tells all others, which fail too. Chunks that were announced are received and dropped then,
so that the group can be used again.
"""

from __future__ import annotations

import hmac
import os
import pickle
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from qwen_longctx.errors import InvalidValue, PatchConflict, RankFailed

IN_FLIGHT = 2  # chunks that were sent and that the next rank has not taken
_A_MOMENT = 2.0  # seconds
_TOKEN = 32  # bytes, by which a rank knows another
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a machine that is gone: 30 seconds


class Chunk(NamedTuple):
    """A chunk as it is announced: the tokens ``[start, stop)`` of the cache, shape and dtype of what is sent."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Message(NamedTuple):
    """What goes over a socket: its kind, the number of the call, and what belongs to it."""

    kind: str
    call: int
    content: Any


class Link:
    """The sockets of one rank to all others.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Through which tensors go.
    peers : dict of int to Connection
        By rank.
    timeout : float
        Seconds for which a message is waited for.
    """

    def __init__(self, group: Any, peers: dict[int, Connection], timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._peers = peers
        self._heard: dict[tuple[int, str, int], deque[Any]] = {}  # by rank, kind and call
        self._failed: dict[int, tuple[int, str]] = {}  # by call: the rank where it failed first, and why
        self._gone: dict[int, str] = {}
        self._news = threading.Condition()
        self._turn = threading.Lock()  # held by the call in progress
        self._number = 0
        self._wake, self._woken = Pipe(duplex=False)
        self._listener = threading.Thread(target=self._listen, name="qwen_longctx pipeline", daemon=True)
        self._listener.start()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take in what the others say until the link is closed."""
        ranks: dict[Any, int] = {connection: rank for rank, connection in self._peers.items()}
        while (ready := wait([*ranks, self._wake])) and self._wake not in ready:
            for connection in ready:
                try:
                    message = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._lose(ranks.pop(connection), "its process has ended, or has left the pipeline")
                except Exception as error:
                    self._lose(ranks.pop(connection), f"what it says cannot be read: {describe(error)}")
                else:
                    self._hear(ranks[connection], message)
        for connection in [*self._peers.values(), self._wake, self._woken]:
            connection.close()

    def _hear(self, rank: int, message: _Message) -> None:
        with self._news:
            if message.kind == "failed":
                self._failed.setdefault(message.call, (rank, message.content))
            else:
                self._heard.setdefault((rank, message.kind, message.call), deque()).append(message.content)
            self._news.notify_all()

    def _lose(self, rank: int, why: str) -> None:
        """Note that a rank does not answer any more; work of a device that waits for it is given up."""
        with self._news:
            in_a_call = self._turn.locked() and (rank, "passed", self._number) not in self._heard
            self._gone.setdefault(rank, why)
            self._news.notify_all()
        if in_a_call:
            _give_up(self.group)

    # --- messages -----------------------------------------------------------------------------------------------------

    def tell(self, ranks: Any, kind: str, content: Any = None) -> None:
        """Send a message of the call in progress to some ranks; that one of them has ended shows in waits."""
        # not by the pickle of multiprocessing, for which torch would put tensors into shared memory
        message = pickle.dumps(_Message(kind, self._number, content))
        for rank in ranks:
            with suppress(OSError):
                self._peers[rank].send_bytes(message)

    def hear(self, rank: int, kind: str, *, heeding: bool = True) -> Any:
        """Wait for a message of the call in progress.

        Parameters
        ----------
        rank : int
        kind : str
        heeding : bool
            Whether a failure that any rank has told ends the wait.

        Raises
        ------
        RankFailed
            A rank failed or ended, or there was no message in time.
        """
        key, until = (rank, kind, self._number), time.monotonic() + self.timeout
        with self._news:
            while True:
                if heeding and self._number in self._failed:
                    where, why = self._failed[self._number]
                    raise RankFailed(f"rank {where} of the pipeline failed, and so does this one: {why}")
                if self._heard.get(key):
                    return self._heard[key].popleft()
                self._check_gone()
                if not self._news.wait(max(0.0, until - time.monotonic())):
                    break
        why = f"it has not answered for {self.timeout:g} s"
        self._lose(rank, why)
        raise RankFailed(_ended(rank, why))

    def _check_gone(self) -> None:
        """Refuse to wait where a rank is gone, unless it had done its part of the call before."""
        for rank, why in self._gone.items():
            if (rank, "passed", self._number) not in self._heard:
                raise RankFailed(_ended(rank, why))

    @property
    def lost(self) -> bool:
        """Whether a rank is gone, so that no further call is possible."""
        return bool(self._gone)

    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.ranks) if rank != self.rank]

    # --- calls --------------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self, device: torch.device) -> Iterator[LinkedCall]:
        """A call that all ranks make together; if it fails here, all others are told.

        Parameters
        ----------
        device : torch.device
            On which this rank receives tensors.

        Raises
        ------
        PatchConflict
            A call is in progress, in another thread for example.
        RankFailed
            Another rank failed or ended.
        """
        if not self._turn.acquire(blocking=False):
            raise PatchConflict(
                "a call of this pipelined model is in progress, and ranks could not tell two of them apart: call it "
                "from one thread, and from no hook of its own"
            )
        try:
            with self._news:
                self._number += 1
                self._heard = {key: held for key, held in self._heard.items() if key[2] >= self._number}
                self._failed = {number: said for number, said in self._failed.items() if number >= self._number}
            call = LinkedCall(self, device)
            try:
                yield call
            except BaseException as error:
                raised = self._as_failure(error)
                call.fail(raised)
                if raised is not error:
                    raise raised from error
                raise
        finally:
            self._turn.release()

    def _as_failure(self, error: BaseException) -> BaseException:
        """What a call raises: that a rank is gone, where work of the device was given up because of that."""
        if isinstance(error, RankFailed) or not isinstance(error, RuntimeError) or not self._gone:
            return error
        return RankFailed(_ended(*next(iter(self._gone.items()))))

    @contextmanager
    def transfer(self, rank: int) -> Iterator[None]:
        """A transfer with a rank, whose failure means that the group can no longer be used."""
        try:
            yield
        except RuntimeError as error:
            with self._news:  # a transfer fails a moment before the socket is seen to be closed
                self._news.wait_for(lambda: self._gone, _A_MOMENT)
            self._lose(rank, f"a transfer failed: {error}")
            raise RankFailed(_ended(*next(iter(self._gone.items())))) from error

    @contextmanager
    def between_calls(self) -> Iterator[None]:
        """If the block fails outside of a call, those of the others that are in their next one fail too."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "__qwen_longctx_told__", False):
                with self._news:
                    self._number += 1
                self.tell(self.others(), "failed", describe(error))
                self.tell([self.rank + 1] if self.rank + 1 < self.ranks else [], "stopped", 0)
            raise

    def close(self) -> None:
        """Leave the pipeline: another rank that calls the model afterwards is told so."""
        with suppress(OSError):
            self._woken.send(None)
        if self._listener is not threading.current_thread():
            self._listener.join(_A_MOMENT)  # a process that ends must not find it at work
        self.group = None


class LinkedCall:
    """One call that all ranks make together."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self.device = link, device
        self._agreed = False
        self._sent = self._taken = 0
        self._flying: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self._link.rank == 0

    def agree(self, what: dict[str, Any], beside: Any = None) -> list[Any]:
        """Make sure that all ranks were called alike; returns what each of them gave `beside`, by rank.

        Raises
        ------
        ValueError
            They were not; every rank raises the same.
        """
        link = self._link
        self._agreed = True
        link.tell(link.others(), "called", (what, beside))
        given = {link.rank: (what, beside)} | {rank: link.hear(rank, "called") for rank in link.others()}
        for name in {name: None for one, _ in given.values() for name in one}:
            values = {rank: one.get(name) for rank, (one, _) in sorted(given.items())}
            if any(value != values[0] for value in values.values()):
                said = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
                raise InvalidValue(
                    f"the ranks of the pipeline were called with different {name} ({said}): run the same script on "
                    "the same inputs on every rank"
                )
        return [given[rank][1] for rank in range(link.ranks)]

    def send(self, start: int, stop: int, hidden: torch.Tensor) -> None:
        """Send the hidden states of the tokens ``[start, stop)`` to the next rank, and go on.

        Waits only while the next rank has not taken one of the last `IN_FLIGHT` chunks.
        """
        link, hidden, to = self._link, hidden.contiguous(), self._link.rank + 1
        if len(self._flying) == IN_FLIGHT:
            self._land()
        link.tell([to], "chunk", Chunk(start, stop, tuple(hidden.shape), hidden.dtype))
        self._sent += 1
        with link.transfer(to):
            work = dist.isend(hidden, dst=_global(link.group, to), group=link.group)
        self._flying.append((work, hidden))

    def take(self) -> tuple[Chunk, torch.Tensor]:
        """Wait for the next chunk of the rank before this one."""
        chunk = self._link.hear(self._link.rank - 1, "chunk")
        return chunk, self._receive(chunk)

    def follow(self) -> None:
        """Wait until the last rank has done a chunk, see `arrive`."""
        self._link.hear(self._link.ranks - 1, "arrived")

    def arrive(self) -> None:
        """Tell the first rank that a chunk has passed all ranks."""
        self._link.tell([0], "arrived")

    def _receive(self, chunk: Chunk) -> torch.Tensor:
        link, source = self._link, self._link.rank - 1
        hidden = torch.empty(chunk.shape, dtype=chunk.dtype, device=self.device)
        with link.transfer(source):
            work = dist.irecv(hidden, src=_global(link.group, source), group=link.group)
            assert work is not None
            work.wait()
        self._taken += 1
        link.tell([source], "taken")
        return hidden

    def _land(self, heeding: bool = True) -> None:
        """Wait until the oldest chunk in flight has been taken, and let go of it."""
        link, to = self._link, self._link.rank + 1
        link.hear(to, "taken", heeding=heeding)
        with link.transfer(to):
            self._flying.popleft()[0].wait()

    def share(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """End the call once all ranks have done their part: every rank gets the tensor of the last one.

        Parameters
        ----------
        tensor : torch.Tensor, optional
            Of the last rank.
        """
        link, last = self._link, self._link.ranks - 1
        while self._flying:
            self._land()
        link.tell(link.others(), "passed", None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        forms = {rank: link.hear(rank, "passed") for rank in link.others()}
        if tensor is None:
            shape, dtype = forms[last]
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        tensor = tensor.contiguous()
        if tensor.numel():  # as bytes: not every backend knows every dtype
            with link.transfer(last):
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=_global(link.group, last), group=link.group)
        return tensor

    def fail(self, error: BaseException) -> None:
        """Tell all others that this rank failed, and receive what was announced, so that the group stays usable."""
        link = self._link
        with suppress(AttributeError, TypeError):
            error.__qwen_longctx_told__ = True  # type: ignore[attr-defined]
        if not isinstance(error, RankFailed):
            link.tell(link.others(), "failed", describe(error))
        if link.rank + 1 < link.ranks:
            link.tell([link.rank + 1], "stopped", self._sent)
        if not self._agreed or link.lost:
            return
        with suppress(RankFailed):  # a rank is gone, as the next call will say
            self._drain()

    def _drain(self) -> None:
        link = self._link
        if link.rank:
            sent = link.hear(link.rank - 1, "stopped", heeding=False)
            while self._taken < sent:
                self._receive(link.hear(link.rank - 1, "chunk", heeding=False))
        while self._flying:
            self._land(heeding=False)


def describe(error: BaseException) -> str:
    """An error in one line, for other ranks."""
    return f"{type(error).__name__}: {error}".strip(": ")


def _ended(rank: int, why: str) -> str:
    return (
        f"rank {rank} of the pipeline is gone ({why}), and with it the process group: end the processes that are left "
        "and start all of them again"
    )


def _global(group: Any, rank: int) -> int:
    return dist.get_global_rank(group, rank)


def _give_up(group: Any) -> None:
    """End transfers of CUDA devices with a process that is gone, for which a device would wait without end."""
    if "nccl" not in dist.get_backend(group):
        return
    with suppress(Exception):  # from here on every call fails anyway, and says why
        backend = group._get_backend(torch.device("cuda"))
        next(getattr(one, name) for one in (backend, group) for name in ("abort", "_abort") if hasattr(one, name))()


# --- how it begins ------------------------------------------------------------------------------------------------


def connect(group: Any, timeout: float, prepare: Callable[[], Any], check: Callable[[list[Any]], None]) -> Link:
    """Connect all ranks of a group with each other; all of them call this together.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
    timeout : float
        See `Link`.
    prepare : callable
        What this rank says of itself, of plain Python types. What it raises, all ranks are told.
    check : callable
        Raises where what all ranks said, by rank, does not fit together; it must do so on all of them alike.

    Raises
    ------
    RankFailed
        Another rank could not prepare itself, or was not reached.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    said: Any = None
    problem: BaseException | None = None
    try:
        said = prepare()
    except Exception as error:
        problem = error
    server = socket.create_server(("", 0), backlog=ranks)
    with server:
        about = (said, problem and describe(problem), _address(), server.getsockname()[1], secrets.token_bytes(_TOKEN))
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, about, group=group)
        if problem is not None:
            raise problem
        for number, (_, why, *_rest) in enumerate(every):
            if why is not None:
                raise RankFailed(f"rank {number} of the pipeline failed, and so does this one: {why}")
        check([one[0] for one in every])
        places = {number: one[2:] for number, one in enumerate(every)}
        return Link(group, _sockets(server, rank, places, timeout), timeout)


def _address() -> tuple[str, str]:
    """The name of this machine, and its address on the way to the machine where all processes meet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        return socket.gethostname(), probe.getsockname()[0]
    return socket.gethostname(), "127.0.0.1"


def _sockets(server: socket.socket, rank: int, places: dict[int, Any], timeout: float) -> dict[int, Connection]:
    """A socket to every other rank: each connects to those below it, and shows the token that they gave out."""
    peers = {}
    try:
        for other in range(rank):
            (name, address), port, token = places[other]
            here = places[rank][0][0] == name
            connected = socket.create_connection(("127.0.0.1" if here else address, port), timeout)
            connected.sendall(token + bytes([rank >> 8, rank & 255]))
            peers[other] = _connection(connected)
        server.settimeout(timeout)
        while len(peers) < len(places) - 1:
            accepted, _ = server.accept()
            accepted.settimeout(timeout)
            token, number = _read(accepted, _TOKEN), _read(accepted, 2)
            if hmac.compare_digest(token, places[rank][2]):
                peers[number[0] << 8 | number[1]] = _connection(accepted)
            else:
                accepted.close()
    except OSError as error:
        for connection in peers.values():
            connection.close()
        raise RankFailed(
            f"rank {rank} did not reach all other ranks of the pipeline ({error}): can every machine open TCP "
            "connections to the others?"
        ) from error
    return peers


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := connection.recv(size - len(found))):
        found += more
    return found.ljust(size, b"\0")


def _connection(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())
