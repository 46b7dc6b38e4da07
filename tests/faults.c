/* Loaded before the C library: makes system calls of the program under test fail while a file says so.
 *
 * FAULTS names a file with one line "CALL ERRNO". A call that failed is noted by one byte more in FAULTS.hits. Only what
 * belongs to the data path is touched: edge-triggered watches, and sockets.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *call) {
    const char *path = getenv("FAULTS");
    char text[64], hits[256];
    int before = errno, number = 0, fd;
    ssize_t size;
    size_t length = strlen(call);
    if (path == NULL || (fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC)) < 0) {
        errno = before;
        return 0;
    }
    size = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    text[size > 0 ? size : 0] = '\0';
    if (strncmp(text, call, length) == 0 && text[length] == ' ') {
        number = atoi(text + length);
        snprintf(hits, sizeof hits, "%s.hits", path);
        fd = syscall(SYS_openat, AT_FDCWD, hits, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (fd >= 0) {
            syscall(SYS_write, fd, "x", 1);
            syscall(SYS_close, fd);
        }
    }
    errno = number ? number : before;
    return number != 0;
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    if (operation == EPOLL_CTL_ADD && event->events & EPOLLET && fails("epoll_ctl"))
        return -1;
    return syscall(SYS_epoll_ctl, epoll, operation, fd, event);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    return fails("accept4") ? -1 : syscall(SYS_accept4, fd, address, size, flags);
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    return fails("send") ? -1 : syscall(SYS_sendto, fd, data, size, flags, NULL, 0);
}

int close(int fd) {
    struct stat status;
    int is_socket = fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode);
    int result = syscall(SYS_close, fd);
    return is_socket && result == 0 && fails("close") ? -1 : result;
}
