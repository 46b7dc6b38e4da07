# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The relay engine with its inner loop in C: same interface, same rules, same limits as `proxy.net.relay.Engine`.

Read proxy/net/relay.py first; it says why things are done as they are. What differs here:

- A pair is one C struct without a Python object of its own, and sockets are plain descriptors: `join` detaches them.
- All that touches bytes or sockets is `noexcept nogil`, so the compiler sees to it that no Python creeps in. It runs with
  the GIL held all the same: a batch takes less time than getting the lock back from another thread.
- A pair that ends inside that C code is only put on the list `_ended`. `_settle`, at the end of the batch (or of `join`,
  `abort_all` …), closes its descriptors, tells its owner and frees it. So no C code ever runs into freed memory.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.errno cimport EAGAIN, EBADF, EINTR, errno
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

import os
import sys

from gevent import get_hub, getcurrent

from proxy.net._fastframes import Shortcut
from proxy.net.alarm import Alarms
from proxy.model import Ending
from proxy.net.peer import has_gone

cdef extern from *:
    """
    #include <fcntl.h>
    #include <limits.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/epoll.h>
    #include <sys/ioctl.h>
    #include <sys/socket.h>
    #include <unistd.h>
    #define RELAY_IN EPOLLIN
    #define RELAY_OUT EPOLLOUT
    #define RELAY_ERR EPOLLERR
    #define RELAY_RDHUP EPOLLRDHUP
    #define RELAY_DEAD (EPOLLERR | EPOLLHUP)
    #define RELAY_CLOSING (EPOLLERR | EPOLLHUP | EPOLLRDHUP)
    #define RELAY_URGENT EPOLLPRI
    #define RELAY_UNSURE (RELAY_CLOSING | EPOLLPRI)
    #define RELAY_ANY 0xFFFFFFFFu
    #define RELAY_REGISTERED (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET)
    #define RELAY_SPLICE_FLAGS (SPLICE_F_MOVE | SPLICE_F_NONBLOCK)

    static void relay_linger_reset(int fd) {
        struct linger now = {1, 0};
        (void) setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }

    static int relay_has_peer(int fd) {
        struct sockaddr_storage peer;
        socklen_t size = sizeof peer;
        return getpeername(fd, (struct sockaddr *) &peer, &size) == 0;
    }

    static int relay_in_flight(int fd) {
        int bytes = 0;
        (void) ioctl(fd, TIOCOUTQ, &bytes);
        return bytes;
    }

    static void relay_fetch(const void *what, size_t size) {
    #if defined(__GNUC__)
        for (size_t at = 0; at < size; at += 64)
            __builtin_prefetch((const char *) what + at);
    #endif
    }

    static void relay_keep_alive(int fd, double idle_timeout) {
        int on = 1, idle = 60, interval = 15, probes = 4;
        double wanted = idle_timeout * 1000;
        int milliseconds = wanted < INT_MAX ? (int) wanted : INT_MAX;
        (void) setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        (void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        (void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
        (void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
        (void) setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds, sizeof milliseconds);
    }
    """
    unsigned RELAY_IN, RELAY_OUT, RELAY_ERR, RELAY_DEAD, RELAY_CLOSING, RELAY_RDHUP, RELAY_REGISTERED, RELAY_SPLICE_FLAGS
    unsigned RELAY_URGENT, RELAY_UNSURE, RELAY_ANY
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, MSG_MORE, MSG_NOSIGNAL, SHUT_WR, O_NONBLOCK, O_CLOEXEC, F_SETPIPE_SZ
    ctypedef union epoll_data_t:
        int fd
    cdef struct epoll_event:
        unsigned events
        epoll_data_t data
    int epoll_create1(int flags) nogil
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event) nogil
    int epoll_wait(int epoll, epoll_event *events, int size, int timeout) nogil
    ssize_t recv(int fd, void *buffer, size_t size, int flags) nogil
    ssize_t send(int fd, const void *buffer, size_t size, int flags) nogil
    ssize_t splice(int source, void *, int target, void *, size_t size, unsigned flags) nogil
    int shutdown(int fd, int how) nogil
    int close(int fd) nogil
    int pipe2(int *ends, int flags) nogil
    int fcntl(int fd, int command, int argument) nogil
    int relay_has_peer(int fd) nogil
    int relay_in_flight(int fd) nogil
    void relay_fetch(const void *what, size_t size) nogil
    void relay_linger_reset(int fd) nogil
    void relay_keep_alive(int fd, double idle_timeout) nogil

cdef enum:
    BUFFER_SIZE = 65536
    EVENTS_A_BATCH = 256
    READS_A_TURN = 16
    FULL_READS_TO_SPLICE = 4
    PIPE_SIZE = 1 << 20
    MAX_PIPES = 32
    CALM_SPLICE = 16384
    SPLICES_A_TURN = 8
    MOST_PIPES = 1024  # room for `max_pipes`
    SWEEP_STEP = 256
    REPLY_CODE = 4
    HEARD = 256

# Indexes of `_ENDINGS`.
cdef enum:
    CLIENT_CLOSED
    UPSTREAM_CLOSED
    CLIENT_RESET
    UPSTREAM_RESET
    INTERNAL_ERROR

cdef tuple _ENDINGS = (
    Ending.CLIENT_CLOSED,
    Ending.UPSTREAM_CLOSED,
    Ending.CLIENT_RESET,
    Ending.UPSTREAM_RESET,
    Ending.INTERNAL_ERROR,
    *[ending for ending in Ending if ending.name not in (
        "CLIENT_CLOSED", "UPSTREAM_CLOSED", "CLIENT_RESET", "UPSTREAM_RESET", "INTERNAL_ERROR"
    )],
)

# One for the whole process: it is empty again whenever a step returns.
cdef char _buffer[BUFFER_SIZE]


cdef struct Pipe:
    int read_end
    int write_end


# One direction; its target is its peer's source.
cdef struct Half:
    Pair *pair
    Half *peer
    Half *next_queued
    char *pending  # received, not yet taken by the kernel; malloc'd
    unsigned pending_size
    unsigned pending_start  # what is before it has been sent
    Pipe pipe  # read_end -1: none
    unsigned in_pipe
    int source
    long long moved  # bytes received
    unsigned char full_reads
    bint unsure  # there may be a mark of urgent data ahead
    bint done
    bint queued


cdef struct Pair:
    Half up
    Half down
    PyObject *owner  # a reference of ours
    Pair *next_ended
    double idle_timeout
    double idle_since
    long long moved_before
    unsigned char ending
    bint reset
    bint dead  # off the table, on the way to `_settle`
    bint settled  # closed and told; to be freed when its halves have left the queue


cdef struct Slot:
    PyObject *callback  # a reference of ours
    unsigned wanted  # the callback's events
    Half *half


cdef inline long long _delivered(Half *half) noexcept nogil:
    return half.moved - half.in_pipe - (half.pending_size - half.pending_start)


cdef class Engine:
    """See `proxy.net.relay.Engine`."""

    name = "compiled"

    cdef object _hub_switch, _loop
    cdef readonly object _watcher, alarms
    cdef int _epoll
    cdef Slot *_table
    cdef int _size
    cdef epoll_event *_events  # not on the stack: greenlets copy that
    cdef int _pairs
    cdef Half *_queue
    cdef Half *_queue_end
    cdef bint _queue_scheduled
    cdef Pair *_ended
    cdef bint _busy  # in a batch: nothing may be closed before its end
    cdef bint _settling
    cdef list _graveyard
    cdef Pipe _free_pipes[MOST_PIPES]
    cdef readonly int free_pipes
    cdef readonly int pipes
    cdef public int max_pipes
    cdef public int pipe_size
    cdef public int reads_a_turn
    cdef public int splices_a_turn
    cdef public double half_close_timeout
    cdef public int faults
    cdef public int rearmed

    def __cinit__(self):
        self._epoll = -1
        self._events = <epoll_event *> malloc(EVENTS_A_BATCH * sizeof(epoll_event))
        if self._events == NULL:
            raise MemoryError
        self.max_pipes = MAX_PIPES
        self.pipe_size = PIPE_SIZE
        self.reads_a_turn = READS_A_TURN
        self.splices_a_turn = SPLICES_A_TURN
        self.half_close_timeout = float("inf")

    def __init__(self):
        hub = get_hub()
        self._loop = hub.loop
        self._hub_switch = hub.switch
        self._graveyard = []
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise _os_error()
        self.alarms = Alarms(self._loop)
        self._watcher = self._loop.io(self._epoll, 1)
        self._watcher.start(self._drain)

    def __dealloc__(self):
        cdef int fd
        for fd in range(self._size):
            Py_XDECREF(self._table[fd].callback)
        free(self._table)
        free(self._events)
        if self._epoll >= 0:
            close(self._epoll)

    # ---------------------------------------------------------------- for greenlets that set up a connection

    def register(self, int fd):
        cdef epoll_event event
        self._make_room(fd)
        memset(&event, 0, sizeof(event))
        event.events = RELAY_REGISTERED
        event.data.fd = fd
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise _os_error()

    def wait(self, int fd, unsigned wanted=RELAY_ANY):
        if fd < 0:
            raise OSError(EBADF, os.strerror(EBADF))
        self._check(fd)
        switch = getcurrent().switch
        self._set_callback(fd, switch)
        self._table[fd].wanted = wanted
        try:
            events = self._hub_switch()
            return events if type(events) is int else 0
        finally:
            if self._table[fd].callback == <PyObject *> switch:
                self._set_callback(fd, None)

    def watch(self, int fd, callback):
        if fd >= 0:
            self._check(fd)
            self._set_callback(fd, callback)

    def forget(self, sock):
        cdef int fd = sock.fileno()
        self._check(fd)
        self._set_callback(fd, None)
        if epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, NULL) < 0:
            raise _os_error()
        sock.close()

    def close(self, sock, bint reset=False):
        cdef int fd = sock.fileno()
        if fd < 0:
            return
        if fd < self._size:
            self._set_callback(fd, None)
        if reset:
            relay_linger_reset(fd)
        if self._busy:
            self._graveyard.append(sock)
        else:
            self._bury(sock)

    cdef void _bury(self, object sock):
        try:
            sock.close()
        except OSError:  # the descriptor is gone all the same
            pass

    cdef int _make_room(self, int fd) except -1:
        cdef int size = fd + 64
        cdef Slot *table
        if fd < 0:
            raise ValueError("negative descriptor")
        if fd >= self._size:
            table = <Slot *> realloc(self._table, size * sizeof(Slot))
            if table == NULL:
                raise MemoryError
            memset(table + self._size, 0, (size - self._size) * sizeof(Slot))
            self._table = table
            self._size = size
        return 0

    cdef int _check(self, int fd) except -1:
        if not 0 <= fd < self._size:
            raise IndexError(f"descriptor {fd} was not registered")
        return 0

    cdef void _set_callback(self, int fd, object callback):
        cdef PyObject *before = self._table[fd].callback
        if callback is None:
            self._table[fd].callback = NULL
        else:
            Py_INCREF(callback)
            self._table[fd].callback = <PyObject *> callback
            self._table[fd].wanted = RELAY_ANY
        Py_XDECREF(before)  # last: it may run any code

    def shortcut(self, transfer, link):
        return Shortcut(transfer, link)

    # ---------------------------------------------------------------- pairs

    def join(
        self,
        client,
        upstream,
        owner,
        double idle_timeout,
        bytes early,
        bint client_registered,
        bint client_readable,
        unsigned upstream_events,
    ):
        cdef Pair *pair
        cdef size_t size = len(early)
        self._check(upstream.fileno())
        self._make_room(client.fileno())
        pair = <Pair *> calloc(1, sizeof(Pair))
        if pair == NULL:
            raise MemoryError
        if size:
            pair.up.pending = <char *> malloc(size)
            if pair.up.pending == NULL:
                free(pair)
                raise MemoryError
            memcpy(pair.up.pending, <char *> early, size)
            pair.up.pending_size = pair.up.moved = size
        pair.up.source = client.detach()
        pair.down.source = upstream.detach()
        pair.up.pair = pair.down.pair = pair
        pair.up.peer = &pair.down
        pair.down.peer = &pair.up
        pair.up.pipe.read_end = pair.down.pipe.read_end = -1
        pair.idle_timeout = idle_timeout
        pair.moved_before = -1
        pair.up.unsure = client_readable
        pair.down.unsure = upstream_events & RELAY_UNSURE != 0
        Py_INCREF(owner)
        pair.owner = <PyObject *> owner
        self._pairs += 1
        self._set_callback(pair.up.source, None)
        self._set_callback(pair.down.source, None)
        self._table[pair.up.source].half = &pair.up
        self._table[pair.down.source].half = &pair.down
        if not client_registered:
            try:
                self.register(pair.up.source)
            except OSError:
                self._fault()
                self._finish(pair, INTERNAL_ERROR, True)
        if not pair.dead:
            if size:
                self._flush(&pair.up)
            elif client_readable:
                self._pump(&pair.up, RELAY_CLOSING)
        if upstream_events and not pair.dead and pair.down.pending == NULL:
            self._pump(&pair.down, upstream_events)
        self._settle()

    @property
    def pairs(self):
        return self._pairs

    def abort_all(self, ending):
        cdef int fd
        cdef int number = _ENDINGS.index(ending)
        cdef Half *half
        for fd in range(self._size):
            half = self._table[fd].half
            if half != NULL:
                self._finish(half.pair, number, True)
        self._settle()

    def abort(self, owner, ending):
        cdef int fd
        cdef int number = _ENDINGS.index(ending)
        cdef Half *half
        cdef bint found = False
        for fd in range(self._size):
            half = self._table[fd].half
            if half != NULL and half.pair.owner == <PyObject *> owner:
                self._finish(half.pair, number, True)
                found = True
                break
        self._settle()
        return found

    def sweep(self, double now):
        cdef int fd = 0
        if not self._watcher.active:
            self.rearmed += 1
            self._watcher.start(self._drain)
        while fd < self._size:
            fd = self._sweep_some(fd, now)
            yield

    cdef int _sweep_some(self, int fd, double now) except -1:
        """Look at some of the table from `fd` on; returns where to go on."""
        cdef int end = min(self._size, fd + SWEEP_STEP)
        cdef Half *half
        for fd in range(fd, end):
            half = self._table[fd].half
            if half != NULL and half == &half.pair.up:
                self._sweep_pair(half.pair, now)
        self._settle()
        return end

    cdef void _sweep_pair(self, Pair *pair, double now):
        cdef bint half_closed
        cdef long long moved
        self._push_on(&pair.up)
        self._push_on(&pair.down)
        if pair.dead:
            return
        half_closed = self._closed(&pair.up) or self._closed(&pair.down)
        moved = _delivered(&pair.up) + _delivered(&pair.down) + half_closed
        if pair.moved_before < 0:
            relay_keep_alive(pair.down.source, pair.idle_timeout)
        if moved != pair.moved_before:
            pair.moved_before = moved
            pair.idle_since = now
        if now - pair.idle_since >= pair.idle_timeout:
            self._finish(pair, _ENDINGS.index(Ending.IDLE_TIMEOUT), True)
        elif half_closed and now - pair.idle_since >= self.half_close_timeout:
            self._finish(pair, _ENDINGS.index(Ending.HALF_CLOSE_TIMEOUT), True)
        elif now != pair.idle_since:
            if not pair.up.in_pipe:
                self._give_pipe(&pair.up)
            if not pair.down.in_pipe:
                self._give_pipe(&pair.down)

    cdef bint _closed(self, Half *half):
        """Whether the source has said FIN; it may stand unread behind bytes that the target does not take."""
        return half.done or ((half.pending != NULL or half.in_pipe) and has_gone(half.source))

    cdef void _push_on(self, Half *half) noexcept nogil:
        if not half.pair.dead and (half.pending != NULL or half.in_pipe) and not relay_in_flight(half.peer.source):
            self._writable(half)

    # ---------------------------------------------------------------- the hot path: with Python ...

    def _drain(self):
        cdef int i, fd
        cdef unsigned events
        cdef int count = epoll_wait(self._epoll, self._events, EVENTS_A_BATCH, 0)
        self._busy = True
        self._fetch(count)
        for i in range(count):
            fd = self._events[i].data.fd
            events = self._events[i].events
            if self._table[fd].half != NULL:
                self._on_event(self._table[fd].half, events)
            elif self._table[fd].callback != NULL and events & self._table[fd].wanted:
                callback = <object> self._table[fd].callback
                try:
                    callback(<int> events)
                except BaseException:
                    self._fault()
                callback = None
        self._busy = False
        if self._graveyard:
            graveyard, self._graveyard = self._graveyard, []
            for sock in graveyard:
                self._bury(sock)
        self._settle()

    cdef void _fetch(self, int count) noexcept nogil:
        """Have the memory of all halves of a batch on its way before the first is looked at. Since their last event the
        kernel has worked for a hundred others, so nothing of them is in the cache, and each would be waited for alone."""
        cdef int i
        cdef Half *half
        for i in range(count):
            half = self._table[self._events[i].data.fd].half
            if half != NULL:
                relay_fetch(half, sizeof(Half))
        for i in range(count):
            half = self._table[self._events[i].data.fd].half
            if half != NULL:
                relay_fetch(half.peer, sizeof(Half))
                relay_fetch(&half.pair.owner, sizeof(Pair) - 2 * sizeof(Half))

    def _go_on(self):
        """Continue the halves whose budget was used up."""
        cdef Half *half = self._queue
        cdef Half *following
        cdef Pair *pair
        self._queue = self._queue_end = NULL
        self._queue_scheduled = False
        while half != NULL:
            following = half.next_queued
            half.next_queued = NULL
            half.queued = False
            pair = half.pair
            if pair.settled:
                self._free(pair)
            elif half.pending == NULL and not half.in_pipe and not half.done and not pair.dead:
                self._read_on(half)
            half = following
        self._settle()

    cdef void _settle(self):
        """Close, tell and free what has ended; see that the queue goes on. Not within a batch, and not within itself."""
        cdef Pair *pair
        cdef long long up, down
        if self._busy or self._settling:
            return
        self._settling = True
        while self._ended != NULL:
            pair = self._ended
            self._ended = pair.next_ended
            if pair.reset:
                relay_linger_reset(pair.up.source)
                relay_linger_reset(pair.down.source)
            close(pair.up.source)
            close(pair.down.source)
            owner = <object> pair.owner
            Py_XDECREF(pair.owner)
            pair.owner = NULL
            ending = _ENDINGS[pair.ending]
            up = pair.up.moved
            down = pair.down.moved
            pair.settled = True
            self._free(pair)
            try:
                owner.ended(ending, up, down)
            except BaseException:
                self._fault()
            owner = None
        self._settling = False
        if self._queue != NULL and not self._queue_scheduled:
            self._queue_scheduled = True
            self._loop.run_callback(self._go_on)

    cdef void _hear(self, Half *half, ssize_t count):
        """So many bytes are in the buffer, upstream's first ones. The owner must not call the engine: we are within."""
        try:
            (<object> half.pair.owner).heard((<char *> _buffer)[:min(count, HEARD)])
        except BaseException:
            self._fault()

    cdef void _fault(self):
        """The exception being handled is a bug of ours, or of a callback."""
        self.faults += 1
        try:
            self._loop.handle_error(self, *sys.exc_info())
        except Exception:  # standard error may be gone
            pass

    # ---------------------------------------------------------------- ... and without

    cdef void _on_event(self, Half *half, unsigned events) noexcept nogil:
        if events & RELAY_OUT and (half.peer.pending != NULL or half.peer.in_pipe):
            self._writable(half.peer)
        if half.pair.dead or not events & (RELAY_IN | RELAY_UNSURE):
            return
        if events & RELAY_URGENT:
            half.unsure = True
        if half.pending != NULL or half.in_pipe:
            if events & RELAY_ERR:  # reset; must not wait until the other side reads again
                self._reset_by(half)
        elif half.done:
            if events & RELAY_DEAD:
                self._reset_by(half)
        elif half.pipe.read_end >= 0:
            self._splice(half)
        else:
            self._pump(half, events)

    cdef void _pump(self, Half *half, unsigned events) noexcept nogil:
        """Read until there is nothing more, within the budget. A short read is the end of it, unless the events tell of
        an end, which no other event will tell of, or of urgent data; RELAY_CLOSING stands for events that went by
        unseen."""
        cdef int more = MSG_MORE if events & RELAY_UNSURE == RELAY_RDHUP else 0
        cdef int turn
        cdef ssize_t count, sent
        for turn in range(self.reads_a_turn):
            count = recv(half.source, _buffer, BUFFER_SIZE, 0)
            if count <= 0:
                if count == 0:
                    self._end_of_file(half, events)
                elif not _for_now():
                    self._reset_by(half)
                return
            if half.moved < REPLY_CODE and half == &half.pair.down and (half.moved or _buffer[0] in (b'4', b'5')):
                with gil:
                    self._hear(half, count)
            half.moved += count
            sent = send(half.peer.source, _buffer, count, MSG_NOSIGNAL | (more if count < BUFFER_SIZE else 0))
            if sent < 0:
                if not _for_now():
                    half.moved -= count
                    self._reset_by(half.peer)
                    return
                sent = 0
            if sent < count:
                self._keep(half, _buffer + sent, count - sent)
                return
            if count < BUFFER_SIZE:
                half.full_reads = 0
                if not events & RELAY_UNSURE:
                    return
            else:
                half.full_reads += 1
                if half.full_reads >= FULL_READS_TO_SPLICE and self._take_pipe(half):
                    self._splice(half)
                    return
        self._go_on_later(half)

    cdef void _keep(self, Half *half, const char *data, unsigned size) noexcept nogil:
        half.pending = <char *> malloc(size)
        if half.pending == NULL:
            half.moved -= size
            self._finish(half.pair, INTERNAL_ERROR, True)
            return
        memcpy(half.pending, data, size)
        half.pending_size = size
        half.pending_start = 0

    cdef void _splice(self, Half *half) noexcept nogil:
        """Move bytes through the kernel's pipe until there is nothing more, within the budget."""
        cdef int turn
        cdef ssize_t count
        for turn in range(self.splices_a_turn):
            count = splice(half.source, NULL, half.pipe.write_end, NULL, self.pipe_size, RELAY_SPLICE_FLAGS)
            if count <= 0:
                if count < 0 and not _for_now():
                    self._reset_by(half)
                elif count == 0 or half.unsure:  # the end, or the mark of urgent data: only a read tells
                    half.unsure = False
                    self._give_pipe(half)
                    self._pump(half, RELAY_CLOSING)
                return
            half.moved += count
            half.in_pipe = <unsigned> count
            if not self._empty_pipe(half):
                return
            if count < CALM_SPLICE:
                self._give_pipe(half)
                break
        self._go_on_later(half)

    cdef bint _empty_pipe(self, Half *half) noexcept nogil:
        """Whether all of it is gone."""
        cdef ssize_t count
        while half.in_pipe:
            count = splice(half.pipe.read_end, NULL, half.peer.source, NULL, half.in_pipe, RELAY_SPLICE_FLAGS)
            if count <= 0:
                if not _for_now():
                    self._reset_by(half.peer)
                return False
            half.in_pipe -= <unsigned> count
        return True

    cdef void _writable(self, Half *half) noexcept nogil:
        """The target of a direction that holds bytes back can take some."""
        if half.in_pipe:
            if self._empty_pipe(half):
                self._read_on(half)
        else:
            self._flush(half)

    cdef void _flush(self, Half *half) noexcept nogil:
        cdef ssize_t sent = send(
            half.peer.source, half.pending + half.pending_start, half.pending_size - half.pending_start, MSG_NOSIGNAL
        )
        if sent < 0:
            if not _for_now():
                self._reset_by(half.peer)
            return
        half.pending_start += <unsigned> sent
        if half.pending_start == half.pending_size:
            self._drop_pending(half)
            self._read_on(half)

    cdef void _drop_pending(self, Half *half) noexcept nogil:
        free(half.pending)
        half.pending = NULL
        half.pending_size = half.pending_start = 0

    cdef void _read_on(self, Half *half) noexcept nogil:
        """What was held back is gone: its source may have had edges meanwhile."""
        if half.done:
            return
        if half.pipe.read_end >= 0:
            self._splice(half)
        else:
            self._pump(half, RELAY_CLOSING)

    cdef void _go_on_later(self, Half *half) noexcept nogil:
        if half.queued:
            return
        half.queued = True
        if self._queue_end != NULL:
            self._queue_end.next_queued = half
        else:
            self._queue = half
        self._queue_end = half

    # ---------------------------------------------------------------- ends

    cdef void _end_of_file(self, Half *half, unsigned events) noexcept nogil:
        """The source said FIN: so do we, to the target; or both have. A reset right behind the FIN is told by these
        events only."""
        if half.done:
            return
        half.done = True
        if half.peer.done:
            self._finish(half.pair, CLIENT_CLOSED if half == &half.pair.down else UPSTREAM_CLOSED, False)
        elif events & RELAY_DEAD and not relay_has_peer(half.source):
            self._reset_by(half)
        elif shutdown(half.peer.source, SHUT_WR) < 0:
            self._reset_by(half.peer)

    cdef void _reset_by(self, Half *half) noexcept nogil:
        """The half's source was reset: pass it on."""
        self._finish(half.pair, CLIENT_RESET if half == &half.pair.up else UPSTREAM_RESET, True)

    cdef void _finish(self, Pair *pair, unsigned char ending, bint reset) noexcept nogil:
        """The one way off the table; the rest is done by `_settle`."""
        if pair.dead:
            return
        pair.dead = True
        pair.ending = ending
        pair.reset = reset
        self._pairs -= 1
        self._table[pair.up.source].half = NULL
        self._table[pair.down.source].half = NULL
        self._finish_half(&pair.up)
        self._finish_half(&pair.down)
        pair.next_ended = self._ended
        self._ended = pair

    cdef void _finish_half(self, Half *half) noexcept nogil:
        half.moved = _delivered(half)
        half.done = True
        self._drop_pending(half)
        self._give_pipe(half)

    cdef void _free(self, Pair *pair) noexcept nogil:
        if not pair.up.queued and not pair.down.queued:
            free(pair)

    # ---------------------------------------------------------------- pipes

    cdef bint _take_pipe(self, Half *half) noexcept nogil:
        cdef int[2] ends
        if self.free_pipes:
            self.free_pipes -= 1
            half.pipe = self._free_pipes[self.free_pipes]
            return True
        half.full_reads = 0
        if self.pipes >= min(self.max_pipes, <int> MOST_PIPES) or pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0:
            return False
        if fcntl(ends[0], F_SETPIPE_SZ, self.pipe_size) < 0:  # the user's allowance of big pipes is used up
            close(ends[0])
            close(ends[1])
            self.max_pipes = self.pipes
            return False
        self.pipes += 1
        half.pipe.read_end = ends[0]
        half.pipe.write_end = ends[1]
        return True

    cdef void _give_pipe(self, Half *half) noexcept nogil:
        if half.pipe.read_end < 0:
            return
        if half.in_pipe:  # it holds a dead connection's bytes
            close(half.pipe.read_end)
            close(half.pipe.write_end)
            self.pipes -= 1
            half.in_pipe = 0
        else:
            self._free_pipes[self.free_pipes] = half.pipe
            self.free_pipes += 1
        half.pipe.read_end = -1
        half.full_reads = 0

    def stop(self):
        self.abort_all(Ending.DRAIN_TIMEOUT)
        self.alarms.stop()
        self._watcher.stop()
        self._watcher.close()
        close(self._epoll)
        self._epoll = -1
        while self.free_pipes:
            self.free_pipes -= 1
            self.pipes -= 1
            close(self._free_pipes[self.free_pipes].read_end)
            close(self._free_pipes[self.free_pipes].write_end)


cdef inline bint _for_now() noexcept nogil:
    """Whether the last system call failed only for now; an event will come."""
    return errno == EAGAIN or errno == EINTR


def _os_error():
    return OSError(errno, os.strerror(errno))
