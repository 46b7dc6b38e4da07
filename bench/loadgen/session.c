/* session.c - one client session, from connect over the proxy's handshake through the SMTP dialogue.
 *
 * A session is a chain of questions and answers, so it is written as one: `advance` holds the whole dialogue, the rest
 * moves octets. How many sessions run, and when, is main.c's business.
 */
#define _GNU_SOURCE
#include "loadgen.h"
#include "native.h"
#include "tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int epoll_fd;
static enum goal goal;
static char buffer[CHUNK];
static char filler[CHUNK];   /* bulk upload */
static char *message;        /* message_bytes of text and the final dot; on a channel, its frame's header stands before */
static int free_channels[MAX_FDS], free_channel_count;

struct totals totals;
void (*on_free)(struct session *s);
void (*on_answer)(struct session *s);

void sample_add(struct samples *s, double microseconds)
{
    if (s->count == s->room) {
        s->room = s->room ? s->room * 2 : 65536;
        s->value = realloc(s->value, s->room * sizeof *s->value);
        if (!s->value)
            die("memory");
    }
    s->value[s->count++] = (float)microseconds;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

double sample_at(struct samples *s, double fraction)
{
    if (!s->count)
        return 0;
    qsort(s->value, s->count, sizeof *s->value, by_value);
    return s->value[(size_t)(fraction * (double)(s->count - 1) + 0.5)];
}

static void watch(struct session *s, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = s};
    if (epoll_ctl(epoll_fd, operation, s->fd, &event))
        die("epoll_ctl");
}

/* Channels are open before the first session and stay open behind the last one. */
static void take_over_channels(void)
{
    if (opt.message_bytes > FRAME_ROOM - FRAME_HEAD - 3) {
        fputs("loadgen: a message goes through a channel in one frame of 64 KB at most\n", stderr);
        exit(64);
    }
    for (int i = 0; i < opt.fd_count; i++) {
        struct epoll_event event = {.events = 0};
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, opt.fds[i], &event))
            die("a channel");
        free_channels[free_channel_count++] = opt.fds[i];
    }
}

void sessions_init(enum goal what)
{
    static const char line[] = "The quick brown fox jumps over the lazy dog, again and again and once more.\r\n";
    static const char dot[] = ".\r\n";
    goal = what;
    epoll_fd = epoll_create1(0);
    if (opt.starttls)
        tls_client();
    memset(filler, 'x', sizeof filler);
    message = malloc(FRAME_HEAD + opt.message_bytes + sizeof line + sizeof dot);
    if (!message)
        die("memory");
    message += FRAME_HEAD;
    size_t length = 0;
    for (; length < opt.message_bytes; length += sizeof line - 1)
        memcpy(message + length, line, sizeof line - 1);
    opt.message_bytes = length;
    memcpy(message + length, dot, sizeof dot - 1);
    frame_head((unsigned char *)message - FRAME_HEAD, F_DATA, length + sizeof dot - 1);
    if (opt.handshake == HS_NATIVE)
        take_over_channels();
}

static void give_channel_back(struct session *s, bool good)
{
    if (!good) {
        fprintf(stderr, "loadgen: a channel failed at step %d, frame 0x%02x\n", s->step, s->head[4]);
        exit(1);
    }
    free_channels[free_channel_count++] = s->fd;
}

static void finish(struct session *s, bool good)
{
    tls_free(s->tls);
    s->tls = NULL;
    if (opt.handshake == HS_NATIVE)
        give_channel_back(s, good);
    else
        close(s->fd);
    s->step = FREE;
    totals.active--;
    if (good) {
        totals.done++;
        sample_add(&totals.session_us, (now() - s->began) * 1e6);
    } else {
        totals.errors++;
    }
    if (on_free)
        on_free(s);
}

/* Sends, and has the rest sent when the socket takes it. `data` must stay where it is
 * unless it is as short as a command, for which a socket always has room. False: the session is over. */
static bool put(struct session *s, const char *data, size_t length)
{
    while (length) {
        ssize_t sent = s->tls ? tls_send(s->tls, data, length) : send(s->fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            finish(s, false);
            return false;
        }
        if (sent < 0)
            break;
        data += sent;
        length -= (size_t)sent;
    }
    s->rest = data;
    s->rest_bytes = length;
    if (s->writing != (length > 0)) {
        s->writing = length > 0;
        watch(s, EPOLL_CTL_MOD, s->writing ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
    return true;
}

/* A command, on a channel in a frame of its own. */
static void ask(struct session *s, enum step step, const char *text, int replies)
{
    size_t length = strlen(text);
    char framed[FRAME_HEAD + 256];
    s->step = step;
    s->replies_due = replies;
    if (opt.handshake != HS_NATIVE) {
        put(s, text, length);
        return;
    }
    frame_head((unsigned char *)framed, F_DATA, length);
    memcpy(framed + FRAME_HEAD, text, length);
    put(s, framed, FRAME_HEAD + length);
}

static void ask_octets(struct session *s, enum step step, const void *data, size_t length, int octets_due)
{
    s->step = step;
    s->replies_due = octets_due;
    put(s, data, length);
}

static struct in_addr nth(struct in_addr first, long n)
{
    return (struct in_addr){htonl(ntohl(first.s_addr) + (uint32_t)n)};
}

static struct in_addr source_of(void)
{
    return nth(opt.first_source, totals.started % opt.sources);
}

/* --- handshakes: each leaves the session waiting for the next answer --- */

static void proxy_v1(struct session *s)
{
    char text[108], from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = source_of();
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    snprintf(text, sizeof text, "PROXY TCP4 %s %s 1 %d\r\n", from, to, ntohs(opt.target.sin_port));
    ask(s, GREETING, text, 1);
}

static void proxy_v2(struct session *s)
{
    unsigned char header[28] = "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";  /* version 2, PROXY, TCP over IPv4, 12 octets follow */
    struct in_addr source = source_of();
    memcpy(header + 16, &source, 4);
    memcpy(header + 20, &opt.target.sin_addr, 4);
    header[25] = 1;  /* source port: no zero, some peers refuse it */
    memcpy(header + 26, &opt.target.sin_port, 2);
    ask_octets(s, GREETING, header, sizeof header, 1);
}

static void socks_request(struct session *s, enum step step, unsigned char verb, struct in_addr address, in_port_t port)
{
    unsigned char request[10] = {5, verb, 0, 1};
    memcpy(request + 4, &address, 4);
    memcpy(request + 8, &port, 2);
    ask_octets(s, step, request, sizeof request, 10);
}

static void socks_after_login(struct session *s)
{
    if (opt.bind_first)
        socks_request(s, SOCKS_BIND, 2, source_of(), 0);
    else
        socks_request(s, SOCKS_CONNECT, 1, opt.target.sin_addr, opt.target.sin_port);
}

static void socks_password(struct session *s)
{
    char text[512];
    int length = snprintf(text, sizeof text, "\1%c%s%c%s", (int)strlen(opt.user), opt.user, (int)strlen(opt.password),
                          opt.password);
    ask_octets(s, SOCKS_PASSWORD, text, (size_t)length, 2);
}

static void socks_method(struct session *s)
{
    ask_octets(s, SOCKS_METHOD, opt.user ? "\5\1\2" : "\5\1\0", 3, 2);
}

static void connected(struct session *s)
{
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
    switch (opt.handshake) {
    case HS_V1: proxy_v1(s); break;
    case HS_V2: proxy_v2(s); break;
    case HS_SOCKS5: socks_method(s); break;
    case HS_NONE: case HS_NATIVE: s->step = GREETING; s->replies_due = 1; break;
    }
}

/* What stands for connect and handshake on a channel. */
static void open_channel(struct session *s)
{
    char from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = source_of();
    struct frame f;
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    frame_begin(&f, F_OPEN);
    frame_array(&f, 2);
    frame_text(&f, from);
    frame_array(&f, 1);
    frame_array(&f, 2);
    frame_text(&f, to);
    frame_uint(&f, ntohs(opt.target.sin_port));
    frame_end(&f);
    ask_octets(s, OPENING, f.octets, f.length, 0);
}

static void end_on_channel(struct session *s)
{
    struct frame f;
    frame_begin(&f, F_END);
    frame_array(&f, 1);
    frame_bool(&f, false);
    frame_end(&f);
    ask_octets(s, ENDING, f.octets, f.length, 0);
}

/* SOCKS5 replies have known lengths: the handshake goes on when the octets are there and say success. */
static void socks_answer(struct session *s, const char *octets)
{
    if (s->step == SOCKS_METHOD ? octets[1] != (opt.user ? 2 : 0) : octets[1] != 0) {
        finish(s, false);
        return;
    }
    switch (s->step) {
    case SOCKS_METHOD:
        if (opt.user)
            socks_password(s);
        else
            socks_after_login(s);
        break;
    case SOCKS_PASSWORD: socks_after_login(s); break;
    case SOCKS_BIND: socks_request(s, SOCKS_CONNECT, 1, opt.target.sin_addr, opt.target.sin_port); break;
    default: s->step = GREETING; s->replies_due = 1; break;
    }
}

/* --- the SMTP dialogue --- */

#define MAIL_LINE "MAIL FROM:<bounce-1234567@sender.example.com> BODY=8BITMIME\r\n"
#define RCPT_LINE "RCPT TO:<recipient@example.net>\r\n"
#define DATA_LINE "DATA\r\n"

static void next_message(struct session *s)
{
    if (opt.pipelining)
        ask(s, DATA, MAIL_LINE RCPT_LINE DATA_LINE, 3);
    else
        ask(s, MAIL, MAIL_LINE, 1);
}

static void send_message(struct session *s)
{
    size_t head = opt.handshake == HS_NATIVE ? FRAME_HEAD : 0;
    ask_octets(s, BODY, message - head, head + opt.message_bytes + 3, 1);
}

static void message_accepted(struct session *s)
{
    totals.messages++;
    if (++s->messages_sent < opt.messages)
        ask(s, RSET, "RSET\r\n", 1);
    else
        ask(s, QUIT, "QUIT\r\n", 1);
}

static void say_ehlo(struct session *s)
{
    ask(s, EHLO, "EHLO mta1.sender.example.com\r\n", 1);
}

/* A flight of the handshake, or the last one: then the dialogue begins anew (RFC 3207 section 4.2). */
static void shake(struct session *s)
{
    s->step = SHAKING;
    enum shaking state = tls_shake(s->tls);
    if (state == TLS_FAILED)
        finish(s, false);
    else if (state == TLS_DONE)
        say_ehlo(s);
}

/* All replies to the last question are in. */
static void advance(struct session *s)
{
    if (s->code != (s->step == DATA ? '3' : '2')) {
        finish(s, false);
        return;
    }
    switch (s->step) {
    case GREETING:
        sample_add(&totals.setup_us, (now() - s->began) * 1e6);
        say_ehlo(s);
        break;
    case EHLO:
        if (opt.starttls && !s->tls) {
            ask(s, STARTTLS, "STARTTLS\r\n", 1);
            break;
        }
        totals.ready++;
        if (goal == GOAL_PARK)
            s->step = PARKED;
        else
            next_message(s);
        break;
    case STARTTLS:
        s->tls = tls_new(s->fd);
        shake(s);
        break;
    case MAIL: ask(s, RCPT, RCPT_LINE, 1); break;
    case RCPT: ask(s, DATA, DATA_LINE, 1); break;
    case DATA: send_message(s); break;
    case BODY: message_accepted(s); break;
    case RSET: next_message(s); break;
    case QUIT:
        if (opt.handshake == HS_NATIVE)
            end_on_channel(s);
        else
            finish(s, true);
        break;
    case NOOP:
        s->step = PARKED;
        totals.round_trips++;
        sample_add(&totals.round_trip_us, (now() - s->asked) * 1e6);
        if (on_answer)
            on_answer(s);
        break;
    default: break;  /* BULK's own "250": nothing to do */
    }
}

/* Counts whole replies; stops early when the session ended or began anew meanwhile. */
static void smtp_octets(struct session *s, const char *data, ssize_t length)
{
    for (ssize_t i = 0; i < length; i++) {
        if (s->column == 0)
            s->code = data[i];
        else if (s->column == 3)
            s->final_line = data[i] == ' ';
        s->column++;
        if (data[i] != '\n')
            continue;
        s->column = 0;
        if (s->final_line && s->replies_due > 0 && --s->replies_due == 0) {
            advance(s);
            if (s->step == FREE || s->step == CONNECTING)
                return;
        }
    }
}

/* --- channels --- */

/* A frame has come whole; what DATA carries was taken before. False: the session is over. */
static bool frame_came(struct session *s)
{
    s->head_octets = 0;
    switch (s->head[4]) {
    case F_DATA: case F_EOF: return true;
    case F_OPENED:
        s->step = GREETING;
        s->replies_due = 1;
        return true;
    default:
        finish(s, s->head[4] == F_ENDED && s->step == ENDING);
        return false;
    }
}

static void framed_octets(struct session *s, const char *data, size_t length)
{
    while (length) {
        if (s->head_octets < FRAME_HEAD) {
            s->head[s->head_octets++] = (unsigned char)*data++;
            length--;
            if (s->head_octets < FRAME_HEAD)
                continue;
            s->frame_left = frame_length(s->head);
        }
        size_t piece = s->frame_left < length ? s->frame_left : length;
        if (s->head[4] == F_DATA)
            smtp_octets(s, data, (ssize_t)piece);
        data += piece;
        length -= piece;
        s->frame_left -= piece;
        if (s->frame_left == 0 && !frame_came(s))
            return;
    }
}

/* --- bulk --- */

static void upload_more(struct session *s)
{
    while (s->bulk_left > 0) {
        ssize_t sent = send(s->fd, filler, s->bulk_left < CHUNK ? (size_t)s->bulk_left : CHUNK, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            finish(s, false);
        if (sent < 0)
            return;
        s->bulk_left -= sent;
    }
    shutdown(s->fd, SHUT_WR);  /* the sink's FIN in return ends the session */
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
}

void session_bulk(struct session *s, int64_t bytes)
{
    static char question[64];
    s->bulk_left = bytes;
    if (opt.download) {
        snprintf(question, sizeof question, "DOWN %lld\r\n", (long long)bytes);
        ask(s, DOWNLOAD, question, 0);
    } else {
        ask(s, UPLOAD, "BULK\r\n", 0);
        watch(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

/* --- events --- */

static void session_on_channel(struct session *s, double began)
{
    *s = (struct session){.fd = free_channels[--free_channel_count], .began = began};
    totals.started++;
    totals.active++;
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
    open_channel(s);
}

void session_start(struct session *s, double began)
{
    if (opt.handshake == HS_NATIVE) {
        session_on_channel(s, began);
        return;
    }
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    bool direct = opt.handshake == HS_NONE;
    struct sockaddr_in local = {.sin_family = AF_INET};
    local.sin_addr = direct ? source_of() : nth(opt.first_client, totals.started % opt.clients);
    if (bind(fd, (struct sockaddr *)&local, sizeof local))
        die("bind");
    *s = (struct session){.fd = fd, .step = CONNECTING, .began = began};
    totals.started++;
    totals.active++;
    watch(s, EPOLL_CTL_ADD, EPOLLOUT);
    struct sockaddr_in *to = &opt.proxy;
    if (connect(fd, (struct sockaddr *)to, sizeof *to) && errno != EINPROGRESS)
        die("connect");
}

void session_quit(struct session *s)
{
    ask(s, QUIT, "QUIT\r\n", 1);
}

void session_ask(struct session *s, double asked)
{
    s->asked = asked;
    ask(s, NOOP, "NOOP\r\n", 1);
}

/* Reads all that is there: what OpenSSL holds back shows no event. */
static void receive_tls(struct session *s)
{
    ssize_t got = 1;
    while (s->tls && (got = tls_recv(s->tls, buffer, sizeof buffer)) > 0)
        smtp_octets(s, buffer, got);
    if (s->tls && (got == 0 || errno != EAGAIN))
        finish(s, false);
}

static void receive(struct session *s)
{
    if (s->tls) {
        receive_tls(s);
        return;
    }
    if (s->step == DOWNLOAD) {
        ssize_t got = recv(s->fd, NULL, 1 << 20, MSG_TRUNC);  /* discard in the kernel, see sink.c */
        if (got > 0)
            s->bulk_left -= got;
        else if (got == 0)
            finish(s, s->bulk_left == 0);
        else if (errno != EAGAIN)
            finish(s, false);
        return;
    }
    bool socks = s->step >= SOCKS_METHOD && s->step <= SOCKS_CONNECT;
    ssize_t got = recv(s->fd, buffer, socks ? (size_t)s->replies_due : sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        finish(s, got == 0 && s->step == UPLOAD && s->bulk_left == 0);
    else if (socks && got < s->replies_due)
        finish(s, false);  /* a reply in pieces: no peer does that on loopback */
    else if (socks)
        socks_answer(s, buffer);
    else if (opt.handshake == HS_NATIVE)
        framed_octets(s, buffer, (size_t)got);
    else
        smtp_octets(s, buffer, got);
}

static void on_event(struct session *s, uint32_t events)
{
    if (s->step == CONNECTING) {
        if (events & (EPOLLERR | EPOLLHUP))
            finish(s, false);
        else
            connected(s);
        return;
    }
    if (s->step == SHAKING) {
        shake(s);
        return;
    }
    if (events & EPOLLOUT) {
        if (s->step == UPLOAD)
            upload_more(s);
        else if (!put(s, s->rest, s->rest_bytes))
            return;
    }
    if (s->step != FREE && events & (EPOLLIN | EPOLLERR | EPOLLHUP))
        receive(s);
}

bool wait_events(double timeout)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    double whole;
    struct timespec t = {.tv_nsec = (long)(modf(timeout, &whole) * 1e9)};
    t.tv_sec = (time_t)whole;
    int count = epoll_pwait2(epoll_fd, events, EVENTS_PER_WAIT, timeout > 0 ? &t : &(struct timespec){0}, NULL);
    for (int i = 0; i < count; i++) {
        struct session *s = events[i].data.ptr;
        if (s && s->step != FREE)
            on_event(s, events[i].events);
    }
    return count > 0;
}
