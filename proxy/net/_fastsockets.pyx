# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Sockets of a session's set-up in C: see `proxy.net.sockets`, which says what they are for and does the same in Python.

A `Socket` is a descriptor and no more: it is made without asking the kernel what it is, and what a set-up does with it is
one system call and one object. Whatever else a `_socket.socket` can do is done by one that is made for that moment
(`_lent`). All of it is non-blocking and so never lets go of the interpreter. Closing twice is harmless, as there.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EBADF, ECONNRESET, EINTR, errno

import os
from _socket import SOCK_STREAM
from _socket import socket as RawSocket

cdef extern from "Python.h":
    int PyErr_ResourceWarning(object source, Py_ssize_t level, const char *text, ...) except -1
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size)
    int _PyBytes_Resize(PyObject **data, Py_ssize_t size) except -1
    object given "(PyObject *)"(PyObject *data)  # with the reference that we have
    Py_ssize_t PyTuple_GET_SIZE(object address)
    PyObject *PyTuple_GET_ITEM(object address, Py_ssize_t index)
    const char *PyUnicode_AsUTF8(object text) except NULL
    object PyUnicode_FromKindAndData(int kind, const void *data, Py_ssize_t size)

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <unistd.h>

    typedef union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage room;
    } sockets_address;

    #define SOCKETS_NO_PORT_YET 24 /* linux/in.h IP_BIND_ADDRESS_NO_PORT */

    /* -1: an errno. */
    static int sockets_accept(int listener, sockets_address *from) {
        socklen_t size = sizeof *from;
        return accept4(listener, &from->any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    }

    /* -1: an errno, and nothing is left open. */
    static int sockets_outgoing(int family) {
        int on = 1;
        int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
            return -1;
        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0
            && setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on) == 0
            && setsockopt(fd, IPPROTO_IP, SOCKETS_NO_PORT_YET, &on, sizeof on) == 0)
            return fd;
        int why = errno;
        (void) close(fd);
        errno = why;
        return -1;
    }

    /* The size of the address; 0: it is none of this family's. */
    static socklen_t sockets_parse(int family, const char *host, int port, sockets_address *address) {
        memset(address, 0, sizeof *address);
        address->any.sa_family = (sa_family_t) family;
        if (family == AF_INET) {
            address->v4.sin_port = htons((uint16_t) port);
            return inet_pton(family, host, &address->v4.sin_addr) == 1 ? sizeof address->v4 : 0;
        }
        address->v6.sin6_port = htons((uint16_t) port);
        return inet_pton(family, host, &address->v6.sin6_addr) == 1 ? sizeof address->v6 : 0;
    }

    /* Its length; an IPv4 address by hand, since inet_ntop has sprintf do it. */
    static int sockets_text(const sockets_address *address, char *text) {
        if (address->any.sa_family == AF_INET6) {
            (void) inet_ntop(AF_INET6, &address->v6.sin6_addr, text, INET6_ADDRSTRLEN);
            return (int) strlen(text);
        }
        const unsigned char *bytes = (const unsigned char *) &address->v4.sin_addr;
        char *at = text;
        for (int i = 0; i < 4; i++) {
            if (bytes[i] >= 100)
                *at++ = (char) ('0' + bytes[i] / 100);
            if (bytes[i] >= 10)
                *at++ = (char) ('0' + bytes[i] / 10 % 10);
            *at++ = (char) ('0' + bytes[i] % 10);
            *at++ = '.';
        }
        return (int) (at - text) - 1;
    }

    static int sockets_name(int fd, sockets_address *address) {
        socklen_t size = sizeof *address;
        return getsockname(fd, &address->any, &size);
    }

    static int sockets_family(const sockets_address *address) {
        return address->any.sa_family;
    }

    static int sockets_port(const sockets_address *address) {
        return ntohs(address->any.sa_family == AF_INET6 ? address->v6.sin6_port : address->v4.sin_port);
    }
    """
    ctypedef struct sockaddr:
        pass
    ctypedef struct sockets_address:
        sockaddr any
    ctypedef unsigned socklen_t
    int AF_INET, AF_INET6, MSG_NOSIGNAL
    int sockets_accept(int listener, sockets_address *address) nogil
    int sockets_outgoing(int family) nogil
    socklen_t sockets_parse(int family, const char *host, int port, sockets_address *address) nogil
    int sockets_text(const sockets_address *address, char *text) nogil
    int sockets_port(const sockets_address *address) nogil
    int sockets_name(int fd, sockets_address *address) nogil
    int sockets_family(const sockets_address *address) nogil
    int c_bind "bind"(int fd, const sockaddr *address, socklen_t size) nogil
    int c_connect "connect"(int fd, const sockaddr *address, socklen_t size) nogil
    int c_close "close"(int fd) nogil
    int c_shutdown "shutdown"(int fd, int how) nogil
    ssize_t c_recv "recv"(int fd, void *data, size_t size, int flags) nogil
    ssize_t c_send "send"(int fd, const void *data, size_t size, int flags) nogil

cdef enum:
    AT_ONCE = 16384  # what is read in one go into the buffer below

# One for the whole process: it is empty again whenever a call returns.
cdef char _buffer[AT_ONCE]


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Socket:
    """See `proxy.net.sockets`; the interface is `_socket.socket`'s, as far as anything needs it."""

    cdef int _fd
    cdef readonly int family

    def __cinit__(self):
        self._fd = -1

    @property
    def type(self):
        return SOCK_STREAM

    @property
    def proto(self):
        return 0

    def __repr__(self):
        return f"<Socket fd={self._fd}>"

    def __del__(self):
        if self._fd >= 0:
            try:
                PyErr_ResourceWarning(self, 1, b"unclosed %R", <PyObject *> self)
            finally:
                self.close()

    # ---------------------------------------------------------------- its descriptor

    def fileno(self):
        return self._fd

    def detach(self):
        cdef int fd = self._fd
        self._fd = -1
        return fd

    def close(self):
        cdef int fd = self._fd
        self._fd = -1
        if fd >= 0 and c_close(fd) < 0 and errno != ECONNRESET:
            PyErr_SetFromErrno(OSError)

    # ---------------------------------------------------------------- its bytes

    def recv(self, Py_ssize_t size, int flags=0):
        if size < 0:
            raise ValueError("negative buffersize in recv")
        if size > AT_ONCE:
            return self._recv_much(size, flags)
        cdef ssize_t count = c_recv(self._fd, _buffer, size, flags)
        while count < 0:
            _again()
            count = c_recv(self._fd, _buffer, size, flags)
        return PyBytes_FromStringAndSize(_buffer, count)

    cdef object _recv_much(self, Py_ssize_t size, int flags):
        """What may be much is not copied once more."""
        cdef PyObject *data = new_bytes(NULL, size)
        cdef ssize_t count = -1
        if data == NULL:
            raise MemoryError
        try:
            count = c_recv(self._fd, PyBytes_AS_STRING(<object> data), size, flags)
            while count < 0:
                _again()
                count = c_recv(self._fd, PyBytes_AS_STRING(<object> data), size, flags)
        finally:
            if count < 0:
                Py_DECREF(<object> data)
        _PyBytes_Resize(&data, count)
        return given(data)

    def recv_into(self, data):
        cdef Py_buffer room
        cdef ssize_t count
        PyObject_GetBuffer(data, &room, PyBUF_WRITABLE)
        try:
            count = c_recv(self._fd, room.buf, room.len, 0)
            while count < 0:
                _again()
                count = c_recv(self._fd, room.buf, room.len, 0)
        finally:
            PyBuffer_Release(&room)
        return count

    def send(self, data, int flags=0):
        cdef Py_buffer bytes_
        cdef ssize_t count
        PyObject_GetBuffer(data, &bytes_, PyBUF_SIMPLE)
        try:
            count = c_send(self._fd, bytes_.buf, bytes_.len, flags | MSG_NOSIGNAL)
            while count < 0:
                _again()
                count = c_send(self._fd, bytes_.buf, bytes_.len, flags | MSG_NOSIGNAL)
        finally:
            PyBuffer_Release(&bytes_)
        return count

    def shutdown(self, int how):
        if c_shutdown(self._fd, how) < 0:
            PyErr_SetFromErrno(OSError)

    # ---------------------------------------------------------------- its ends

    def bind(self, address):
        cdef sockets_address parsed
        cdef socklen_t size = self._parse(address, &parsed)
        if size == 0:
            self._lent("bind", address)
        elif c_bind(self._fd, &parsed.any, size) < 0:
            PyErr_SetFromErrno(OSError)

    def connect_ex(self, address):
        cdef sockets_address parsed
        cdef socklen_t size = self._parse(address, &parsed)
        if size == 0:
            return self._lent("connect_ex", address)
        return 0 if c_connect(self._fd, &parsed.any, size) == 0 else errno

    def getsockname(self):
        cdef sockets_address address
        if self.family != AF_INET:
            return self._lent("getsockname")
        if sockets_name(self._fd, &address) < 0:
            PyErr_SetFromErrno(OSError)
        return _endpoint(&address)

    def getpeername(self):
        return self._lent("getpeername")

    def setsockopt(self, *arguments):
        self._lent("setsockopt", *arguments)

    def getsockopt(self, *arguments):
        return self._lent("getsockopt", *arguments)

    def setblocking(self, flag):
        self._lent("setblocking", flag)

    def _lent(self, name, *arguments):
        """Have a Python socket do it."""
        if self._fd < 0:
            raise OSError(EBADF, os.strerror(EBADF))
        sock = RawSocket(self.family, SOCK_STREAM, 0, self._fd)
        try:
            return getattr(sock, name)(*arguments)
        finally:
            sock.detach()

    cdef socklen_t _parse(self, address, sockets_address *parsed) except? 0:
        """0: not plainly an address of this family and a port; a Python socket knows more kinds, or says what is wrong."""
        if not isinstance(address, tuple) or PyTuple_GET_SIZE(address) != 2:
            return 0
        host = <object> PyTuple_GET_ITEM(address, 0)
        port = <object> PyTuple_GET_ITEM(address, 1)
        if type(host) is not str or type(port) is not int or not 0 <= port <= 65535:
            return 0
        return sockets_parse(self.family, PyUnicode_AsUTF8(host), port, parsed)


cdef tuple _endpoint(const sockets_address *address):
    cdef char text[64]
    return PyUnicode_FromKindAndData(1, text, sockets_text(address, text)), sockets_port(address)


cdef Socket _socket(int fd, int family):
    cdef Socket sock = Socket.__new__(Socket)
    sock._fd = fd
    sock.family = family
    return sock


cdef int _again() except -1:
    """Raise what a system call has failed with, unless that was a signal."""
    if errno != EINTR:
        PyErr_SetFromErrno(OSError)
    return PyErr_CheckSignals()


def accept(listener):
    """See `proxy.net.sockets.accept`."""
    cdef sockets_address address
    cdef int fd = sockets_accept(listener.fileno(), &address)
    while fd < 0:
        _again()
        fd = sockets_accept(listener.fileno(), &address)
    return _socket(fd, sockets_family(&address)), _endpoint(&address)


def outgoing(int family):
    """See `proxy.net.sockets.outgoing`."""
    cdef int fd = sockets_outgoing(family)
    if fd < 0:
        PyErr_SetFromErrno(OSError)
    return _socket(fd, family)
