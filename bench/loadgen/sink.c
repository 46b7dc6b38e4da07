/* sink.c - the MX of the benchmark: one process, one thread, answers SMTP and keeps nothing.
 *
 * Beside SMTP it knows words of its own: for bulk transfers `BULK` (from here on swallow octets uncounted, copied
 * nowhere) and `DOWN n` (send n octets, then close), and `STAT`, which tells what it has accepted so far, for whoever
 * wants to know that nothing was lost on the way. With a certificate it offers STARTTLS. It also swallows UDP datagrams
 * on its port: a place for a peer to send its syslog lines to.
 */
#define _GNU_SOURCE
#include "loadgen.h"
#include "tls.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum reading { COMMANDS, MESSAGE, SWALLOW, SENDING, HANDSHAKE };

struct connection {
    int fd;
    struct ssl_st *tls;    /* NULL: in clear */
    enum reading reading;
    size_t line_length;
    char line[512];
    int matched;           /* octets of the end mark CR LF . CR LF seen so far */
    int64_t to_send;
};

static int epoll_fd;
static char buffer[CHUNK];
static struct sink_counts accepted;  /* all there ever was */

static void watch(struct connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &event))
        die("epoll_ctl");
}

static void drop(struct connection *c)
{
    tls_free(c->tls);
    close(c->fd);
    free(c);
}

static void say(struct connection *c, const char *text)
{
    /* short, and the client waits for it: the buffer has room */
    if (c->tls)
        tls_send(c->tls, text, strlen(text));
    else
        send(c->fd, text, strlen(text), MSG_NOSIGNAL);
}

static void accept_all(int listener)
{
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c)
            die("memory");
        c->fd = fd;
        accepted.connections++;
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
        say(c, "220 sink.example.net ESMTP\r\n");
    }
}

/* Sends what the socket takes. False: the connection is gone. */
static bool send_more(struct connection *c)
{
    while (c->to_send > 0) {
        size_t chunk = c->to_send < CHUNK ? (size_t)c->to_send : CHUNK;
        ssize_t sent = send(c->fd, buffer, chunk, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return true;
        if (sent < 0)
            break;
        c->to_send -= sent;
    }
    drop(c);
    return false;
}

#define EHLO_REPLY(more) "250-sink.example.net\r\n250-PIPELINING\r\n" more "250-8BITMIME\r\n250 SIZE 52428800\r\n"

/* Looks for the end mark; returns how many octets belong to the message. */
static size_t message_octets(struct connection *c, const char *data, size_t length)
{
    static const char mark[] = "\r\n.\r\n";
    for (size_t i = 0; i < length; i++) {
        if (c->matched == 0) {  /* skip quickly to the next CR */
            const char *cr = memchr(data + i, '\r', length - i);
            if (!cr)
                return length;
            i = (size_t)(cr - data);
        }
        if (data[i] == mark[c->matched])
            c->matched++;
        else
            c->matched = data[i] == '\r';
        if (c->matched == sizeof mark - 1) {
            c->reading = COMMANDS;
            return i + 1;
        }
    }
    return length;
}

static void tell_counts(struct connection *c)
{
    char text[128];
    accepted.connections--;  /* who asks does not count */
    snprintf(text, sizeof text, "250 %ld %lld %ld %ld\r\n", accepted.messages, accepted.octets, accepted.connections,
             accepted.handshakes);
    say(c, text);
}

/* Answers one whole command line. False: the connection is gone. */
static bool command(struct connection *c)
{
    c->line[c->line_length] = 0;
    c->line_length = 0;
    if (!strncasecmp(c->line, "EHLO", 4)) {
        say(c, opt.certificate && !c->tls ? EHLO_REPLY("250-STARTTLS\r\n") : EHLO_REPLY(""));
    } else if (!strncasecmp(c->line, "STARTTLS", 8) && opt.certificate && !c->tls) {
        say(c, "220 2.0.0 Go ahead\r\n");
        c->tls = tls_new(c->fd);
        c->reading = HANDSHAKE;
    } else if (!strncasecmp(c->line, "STAT", 4)) {
        tell_counts(c);
    } else if (!strncasecmp(c->line, "DATA", 4)) {
        c->reading = MESSAGE;
        c->matched = 2;  /* the command's own CR LF counts: an empty message is just ". CR LF" */
        say(c, "354 End data with <CR><LF>.<CR><LF>\r\n");
    } else if (!strncasecmp(c->line, "QUIT", 4)) {
        say(c, "221 2.0.0 Bye\r\n");
        drop(c);
        return false;
    } else if (!strncasecmp(c->line, "BULK", 4)) {
        c->reading = SWALLOW;
        say(c, "250 2.0.0 Go on\r\n");
    } else if (!strncasecmp(c->line, "DOWN ", 5)) {
        c->reading = SENDING;
        c->to_send = atoll(c->line + 5);
        watch(c, EPOLL_CTL_MOD, EPOLLOUT);
        return send_more(c);
    } else {
        say(c, "250 2.0.0 Ok\r\n");
    }
    return true;
}

/* Takes what was received. False: the connection is gone. */
static bool take(struct connection *c, const char *data, size_t length)
{
    while (length && (c->reading == COMMANDS || c->reading == MESSAGE)) {
        size_t used;
        if (c->reading == MESSAGE) {
            used = message_octets(c, data, length);
            accepted.octets += (long long)used;
            if (c->reading == COMMANDS) {
                accepted.messages++;
                say(c, "250 2.0.0 Ok: queued\r\n");
            }
        } else {
            const char *end = memchr(data, '\n', length);
            used = end ? (size_t)(end - data) + 1 : length;
            if (c->line_length + used >= sizeof c->line) {
                drop(c);
                return false;
            }
            memcpy(c->line + c->line_length, data, used);
            c->line_length += used;
            if (end && !command(c))
                return false;
        }
        data += used;
        length -= used;
    }
    return true;
}

static void shake(struct connection *c)
{
    enum shaking state = tls_shake(c->tls);
    if (state == TLS_FAILED) {
        drop(c);
    } else if (state == TLS_DONE) {
        accepted.handshakes++;
        c->reading = COMMANDS;
    }
}

/* Reads all that is there: what OpenSSL holds back shows no event. */
static void read_tls(struct connection *c)
{
    ssize_t got;
    while ((got = tls_recv(c->tls, buffer, sizeof buffer)) > 0)
        if (!take(c, buffer, (size_t)got))
            return;
    if (got == 0 || errno != EAGAIN)
        drop(c);
}

static void on_event(struct connection *c, uint32_t events)
{
    if (c->reading == HANDSHAKE) {
        shake(c);
        return;
    }
    if (c->tls) {
        read_tls(c);
        return;
    }
    if (c->reading == SENDING) {
        if (events & (EPOLLERR | EPOLLHUP))
            drop(c);
        else
            send_more(c);
        return;
    }
    /* MSG_TRUNC on TCP discards in the kernel: bulk measures the proxy, not this program's memory copies. */
    ssize_t got = c->reading == SWALLOW ? recv(c->fd, NULL, 1 << 20, MSG_TRUNC) : recv(c->fd, buffer, sizeof buffer, 0);
    if (got > 0)
        take(c, buffer, (size_t)got);
    else if (got == 0 || errno != EAGAIN)
        drop(c);
}

static int bound_socket(int type)
{
    int fd = socket(AF_INET, type | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (type == SOCK_STREAM)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&opt.target, sizeof opt.target))
        die("sink: bind");
    return fd;
}

void run_sink(void)
{
    struct connection listener = {.fd = bound_socket(SOCK_STREAM)}, datagrams = {.fd = bound_socket(SOCK_DGRAM)};
    epoll_fd = epoll_create1(0);
    if (opt.certificate)
        tls_server(opt.certificate, opt.key);
    if (listen(listener.fd, 8192))
        die("sink: listen");
    watch(&listener, EPOLL_CTL_ADD, EPOLLIN);
    watch(&datagrams, EPOLL_CTL_ADD, EPOLLIN);
    memset(buffer, 'x', sizeof buffer);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS_PER_WAIT];
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == &listener)
                accept_all(listener.fd);
            else if (c == &datagrams)
                while (recv(datagrams.fd, buffer, sizeof buffer, 0) >= 0)
                    ;
            else
                on_event(c, events[i].events);
        }
    }
}
