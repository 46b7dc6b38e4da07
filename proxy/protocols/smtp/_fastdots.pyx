# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`proxy.protocols.smtp.dots.scan` in C; what it finds, and why, stands there."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr


def scan(bytes data not None):
    cdef const char *begin = PyBytes_AS_STRING(data)
    cdef const char *end = begin + PyBytes_GET_SIZE(data)
    cdef const char *dot = begin
    cdef char before, behind
    cdef bint lone = False
    while dot < end:
        dot = <const char *> memchr(dot, b'.', end - dot)
        if dot == NULL:
            break
        # The bytes object ends with a NUL of its own, so there is always a byte behind; but it is none of the data.
        before = dot[-1] if dot > begin else b'.'
        behind = dot[1] if dot + 1 < end else b'.'
        if before == b'\0' or behind == b'\0':
            lone = True
        elif (before == b'\n' or before == b'\r') and (behind == b'\n' or behind == b'\r'):
            if before == b'\n' and behind == b'\r' and dot - 2 >= begin and dot[-2] == b'\r':
                if dot + 2 == end:  # it may still become the end
                    break
                if dot[2] == b'\n':
                    return 2 * (dot - 2 - begin) + lone
            lone = True
        dot += 1
    return -2 + lone
