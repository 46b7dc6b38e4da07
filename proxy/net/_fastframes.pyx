# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The usual event of a session on a native channel, in C: what one side says, the other takes, and both go on.

Read proxy/doors/native/transfer.py first: it says what is to be done, and does it, also where this was not built. A
`Shortcut` has each event of the two sockets before its steps have. It cuts frames and makes them, has the tracker look
at the bytes, and sends them on; neither the channel's greenlet nor any code of `Transfer` runs for that. What is not
usual it does not handle: it gives all that it knows back (`_let_go`) and calls the step, which acts on it as if it had
been there from the beginning. That is an END or another message, bytes that a side does not take, a MAIL that waits, a
reset, more than one event's share. A FIN of the receiver is usual.

- Sockets in clear are read and written here. Where a side is under TLS, its stream is asked in Python for bytes, and
  given them; frames are cut and made here all the same.
- Nothing here waits, and nothing is held back between two events but the beginning of a frame's header.
- As in `_fastrelay` an edge is only a hint; a short read is the last one unless the event tells of an end.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy, memmove

import os

from proxy.net.tls import PlainStream
from proxy.net.turns import TurnOver
from proxy.policy import turns
from proxy.protocols.native import frames
from proxy.protocols.native import messages

cdef extern from *:
    """
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #define FRAMES_IN EPOLLIN
    #define FRAMES_RDHUP EPOLLRDHUP
    #define FRAMES_UNSURE (EPOLLERR | EPOLLHUP | EPOLLRDHUP | EPOLLPRI)
    """
    unsigned FRAMES_IN, FRAMES_RDHUP, FRAMES_UNSURE
    int MSG_NOSIGNAL, MSG_PEEK
    ssize_t recv(int fd, void *buffer, size_t size, int flags) nogil
    ssize_t send(int fd, const void *buffer, size_t size, int flags) nogil

cdef enum:
    HEADER = 5
    SIZE = 65536  # of a read, and of the longest frame
    READS_A_SIDE = 4

# What is left to do after a read.
cdef enum:
    NOTHING
    MORE  # there may be something to be read
    UNUSUAL

cdef int DATA = frames.DATA
cdef unsigned MOST_FRAMES = turns.WORK // turns.FRAME
cdef bytes _EOF = frames.encode(messages.Eof())
assert frames.HEADER == HEADER and frames.MAX_PAYLOAD == SIZE

# One for the whole process: it is empty again whenever other code runs. A frame's header may stand before what a read
# brings, and the frame that tells of an end behind it.
cdef char _buffer[HEADER + SIZE + 16]


cdef class Shortcut:
    """See `proxy.net.relay.Shortcut`.

    Args:
        transfer: a `proxy.doors.native.transfer.Transfer`. link: its `Link`.
    """

    cdef object _transfer, _link, _decoder
    cdef object _client, _receiver  # streams
    cdef object _tracker
    cdef object _client_step, _receiver_step  # None: nobody waits
    cdef int _client_fd, _receiver_fd  # -1: not in clear, or not ours
    cdef bint _ours  # we have the decoder's place
    cdef bint _unasked
    cdef unsigned _left  # bytes of the current DATA frame that are still to come
    cdef int _have  # bytes of the next header
    cdef char _header[HEADER]
    cdef bint _more  # see `_read`
    cdef bint _unsent  # see `_send`
    cdef int _reads  # of the receiver, that are left for an event
    cdef char *_piece  # in the buffer, as is the next
    cdef char *_rest
    cdef Py_ssize_t _rest_size
    cdef unsigned _limit
    cdef long long _up, _down
    cdef readonly long long moved

    def __init__(self, transfer, link):
        self._transfer = transfer
        self._link = link
        self._decoder = link.decoder
        self._client = link.stream
        self._receiver = transfer.stream
        self._tracker = transfer.tracker
        self._limit = self._decoder.limit

    # ---------------------------------------------------------------- a wait

    def begin(self, client_event, receiver_event):
        self._client_step = client_event
        self._receiver_step = receiver_event
        self._take_over()

    def look(self):
        if not self._ours:
            return True
        try:
            if self._from_receiver(True) == NOTHING and (
                not self._link.may_hold or self._from_client(True) == NOTHING
            ):
                self._link.saw_all()
                self._transfer.saw_all()
                return False
        except TurnOver:
            pass
        self._let_go(b"")
        return True

    def end(self):
        self._client_step = self._receiver_step = None
        self._let_go(b"")

    cdef int _take_over(self) except -1:
        """Unless something is not usual, or nobody waits."""
        cdef long long left
        if self._ours or self._client_step is None or not self._transfer.usual:
            return 0
        left = self._decoder.lend()
        if left < 0:
            return 0
        self._left = left
        self._client_fd = _plain(self._client)
        self._receiver_fd = _plain(self._receiver)
        self._unasked = self._transfer.unasked
        self._ours = True
        return 0

    cdef int _let_go(self, bytes rest) except -1:
        """Give everything back. `rest`: was read and not cut."""
        if not self._ours:
            return 0
        self._ours = False
        transfer, link = self._transfer, self._link
        transfer.up += self._up
        transfer.down += self._down
        link.moved += self.moved
        self._up = self._down = self.moved = 0
        if self._have:
            rest = PyBytes_FromStringAndSize(self._header, self._have)
            self._have = 0
        self._decoder.resume(self._left, rest)
        return 0

    # ---------------------------------------------------------------- events

    def client_event(self, int events):
        if self._ours and not events & FRAMES_UNSURE:
            if not events & FRAMES_IN:
                return  # there is room for more, and nothing waits for it
            try:
                if self._from_client(False) == NOTHING:
                    return
                if not self._more:  # all of it has been read
                    events &= ~FRAMES_IN
            except TurnOver:
                pass
            except BaseException as error:
                self._let_go(b"")
                self._link.fail(error)
                return
        self._let_go(b"")
        self._client_step(events)
        self._take_over()

    def receiver_event(self, int events):
        if self._ours and events & FRAMES_UNSURE in (0, FRAMES_RDHUP):
            if not events & (FRAMES_IN | FRAMES_RDHUP) or self._transfer.receiver_done:
                return
            try:
                if self._from_receiver(events & FRAMES_RDHUP != 0) == NOTHING:
                    return
            except BaseException as error:
                self._let_go(b"")
                self._link.fail(error)
                return
        self._let_go(b"")
        self._receiver_step(events)
        self._take_over()

    cdef ssize_t _read(self, stream, int fd, char *to, Py_ssize_t room) except? -2:
        """Read once; 0: the end; -1: nothing now. `_more` says whether there may be more.

        Raises:
            OSError: broken. TurnOver.
        """
        cdef ssize_t count
        if fd >= 0:
            count = recv(fd, to, room, 0)
            self._more = count == room
            if count < 0 and not _for_now():
                raise _os_error()
            return count
        self._more = False
        try:
            data = stream.recv(room)
        except BlockingIOError:
            return -1
        self._more = not stream.drained
        count = PyBytes_GET_SIZE(data)
        if count > room:
            raise BufferError("a stream gave more than it was asked for")
        memcpy(to, PyBytes_AS_STRING(data), count)
        return count

    cdef Py_ssize_t _send(self, stream, int fd, const char *data, Py_ssize_t size) except -1:
        """Send what goes now; how much that was. `_unsent` says whether TLS holds some of it back.

        Raises:
            OSError: broken.
        """
        cdef Py_ssize_t sent = 0
        self._unsent = False
        if fd >= 0:
            sent = send(fd, data, size, MSG_NOSIGNAL)
            if sent < 0:
                if not _for_now():
                    raise _os_error()
                sent = 0
        else:
            try:
                while sent < size and not self._unsent:
                    sent += stream.send(PyBytes_FromStringAndSize(data + sent, size - sent))
                    self._unsent = stream.unsent
            except BlockingIOError:
                self._unsent = True
        self.moved += sent
        return sent

    # ---------------------------------------------------------------- from the client

    cdef int _from_client(self, bint to_the_end) except -1:
        cdef int turn, outcome = NOTHING
        for turn in range(READS_A_SIDE):
            outcome = self._read_client(to_the_end)
            if outcome != MORE:
                break
        return outcome

    cdef int _read_client(self, bint to_the_end) except -1:
        """Read once, cut, and send on. `to_the_end`: no event will tell of more."""
        cdef ssize_t count
        cdef Py_ssize_t size
        cdef bytes rest = b""
        cdef int outcome
        try:
            count = self._read(self._client, self._client_fd, _buffer + self._have, SIZE)
        except OSError:
            raise self._link.broken() from None
        if count < 0:
            return NOTHING
        if not count:
            raise self._link.closed()
        self.moved += count
        size = self._cut(count)
        if self._rest_size:
            rest = PyBytes_FromStringAndSize(self._rest, self._rest_size)
        outcome = self._give(self._piece, size) if size else NOTHING
        if self._client_fd < 0 and self._client.unsent:  # TLS has something to say of its own
            self._link.hold(b"")
            outcome = UNUSUAL
        if self._rest_size:
            self._let_go(rest)
            return UNUSUAL
        return MORE if outcome == NOTHING and (self._more or to_the_end) else outcome

    cdef Py_ssize_t _cut(self, Py_ssize_t count) noexcept nogil:
        """Take the headers out of the buffer; returns how many bytes of DATA are at `_piece`, in one. What is no DATA
        is at `_rest`, with all that is behind it."""
        cdef char *at = _buffer
        cdef char *end = _buffer + self._have + count
        cdef char *to = NULL
        cdef Py_ssize_t size
        cdef unsigned length, found = 0
        memcpy(_buffer, self._header, self._have)
        self._have = 0
        self._rest_size = 0
        self._piece = NULL
        while at < end:
            if not self._left:
                if end - at < HEADER:
                    self._have = <int> (end - at)
                    memcpy(self._header, at, self._have)
                    break
                length = _length(at)
                if at[HEADER - 1] != DATA or not length or length > self._limit or found == MOST_FRAMES:
                    self._rest = at
                    self._rest_size = end - at
                    break
                found += 1
                self._left = length
                at += HEADER
            size = min(<Py_ssize_t> self._left, end - at)
            if self._piece == NULL:
                self._piece = to = at
            elif size:
                memmove(to, at, size)
            to += size
            at += size
            self._left -= <unsigned> size
        return to - self._piece if self._piece != NULL else 0

    cdef int _give(self, const char *piece, Py_ssize_t size) except -1:
        """Send the client's bytes on."""
        cdef Py_ssize_t sent
        cdef bint whole = True
        transfer = self._transfer
        if self._tracker is not None:
            data = PyBytes_FromStringAndSize(piece, size)
            seen = transfer.look(self._tracker, data)
            whole = seen is data
            piece = PyBytes_AS_STRING(seen)
            size = PyBytes_GET_SIZE(seen)
            if not size:
                return UNUSUAL
        self._up += size
        self._unasked = False
        try:
            sent = self._send(self._receiver, self._receiver_fd, piece, size)
        except OSError as error:
            transfer.write_failed(error)
            return UNUSUAL
        if sent < size or self._unsent:
            transfer.hold(PyBytes_FromStringAndSize(piece + sent, size - sent))
            return UNUSUAL
        return NOTHING if whole else UNUSUAL

    # ---------------------------------------------------------------- from the receiver

    cdef int _from_receiver(self, bint to_the_end) except -1:
        cdef int outcome = MORE
        if self._unasked:
            if self._receiver_fd >= 0 and recv(self._receiver_fd, _buffer, 1, MSG_PEEK) < 0 and _for_now():
                return NOTHING
            return UNUSUAL
        self._reads = READS_A_SIDE
        while self._reads and outcome == MORE:
            outcome = self._read_receiver(to_the_end)
        return outcome

    cdef int _read_receiver(self, bint to_the_end) except -1:
        """Read what makes a frame, and send it on. `to_the_end`: no other event will tell of the end."""
        cdef ssize_t count = -1
        cdef Py_ssize_t size = 0, all_of_it
        cdef char *frame = _buffer
        cdef bint over = False
        broken = None
        while size < SIZE and self._reads:
            self._reads -= 1
            try:
                count = self._read(self._receiver, self._receiver_fd, _buffer + HEADER + size, SIZE - size)
            except TurnOver:
                over = True
                break
            except OSError as error:
                broken = error
                break
            if count <= 0:
                break
            size += count
            if not (to_the_end or (self._more and self._receiver_fd < 0)):
                break
        if size:
            _write_header(_buffer, <unsigned> size)
            if self._tracker is not None:
                self._tracker.server_bytes(PyBytes_FromStringAndSize(_buffer + HEADER, size))
            all_of_it = HEADER + size
        else:
            frame = _buffer + HEADER
            all_of_it = 0
        if not count and broken is None and not over:
            memcpy(frame + all_of_it, PyBytes_AS_STRING(_EOF), PyBytes_GET_SIZE(_EOF))
            all_of_it += PyBytes_GET_SIZE(_EOF)
            self._transfer.ended()
        self._down += size
        self.moved += size
        if all_of_it and not self._tell(frame, all_of_it):
            over = True
        if broken is not None:
            self._transfer.aborted(broken)
            return UNUSUAL
        if self._receiver_fd < 0 and self._receiver.unsent:  # TLS has something to say of its own
            self._transfer.hold(b"")
            return UNUSUAL
        if over:
            return UNUSUAL
        return MORE if count > 0 and (self._more or to_the_end) else NOTHING

    cdef bint _tell(self, const char *frames_, Py_ssize_t size) except? True:
        """Send whole frames to the client; whether it has taken them."""
        cdef Py_ssize_t sent
        try:
            sent = self._send(self._client, self._client_fd, frames_, size)
        except OSError:
            raise self._link.broken() from None
        if sent < size or self._unsent:
            self._link.hold(PyBytes_FromStringAndSize(frames_ + sent, size - sent))
            return False
        return True


cdef inline unsigned _length(const char *header) noexcept nogil:
    cdef const unsigned char *at = <const unsigned char *> header
    return (<unsigned> at[0] << 24) | (<unsigned> at[1] << 16) | (<unsigned> at[2] << 8) | at[3]


cdef inline void _write_header(char *to, unsigned length) noexcept nogil:
    to[0] = <char> (length >> 24)
    to[1] = <char> (length >> 16)
    to[2] = <char> (length >> 8)
    to[3] = <char> length
    to[4] = <char> DATA


cdef inline bint _for_now() noexcept nogil:
    """Whether the last system call failed only for now; an event will come."""
    return errno == EAGAIN or errno == EINTR


cdef int _plain(stream) except -2:
    """The descriptor, if the bytes of the stream are those of its socket."""
    return stream.socket.fileno() if type(stream) is PlainStream else -1


cdef _os_error():
    return OSError(errno, os.strerror(errno))
