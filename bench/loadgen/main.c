/* main.c - options, the load patterns, and the JSON report. */
#define _GNU_SOURCE
#include "loadgen.h"
#include "tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

static const double STALL = 20.0;        /* seconds without any event: give up instead of hanging */
static const long CONNECTING_AT_ONCE = 200; /* while many connections are brought up */

struct options opt = {
    .sources = 16, .clients = 16, .connections = 100, .messages = 1, .message_bytes = 20 * 1024, .megabytes = 1000,
};

static struct session *sessions;

_Noreturn static void usage(void)
{
    fputs("usage: loadgen sink|load|pingpong|bulk|idle|permits OPTIONS\n"
          "  --target IP:PORT        the sink (127.0.4.1:2525)\n"
          "  --proxy IP:PORT         connect here instead (default: straight to the target)\n"
          "  --handshake none|v1|v2|socks5|native\n"
          "  --user NAME --password WORD, --bind     SOCKS5: log in; name the source by BIND first\n"
          "  --fds N[,N]             native: channels, permits: sessions, that are authenticated; inherited\n"
          "  --incarnations N[,N]    permits: of these sessions\n"
          "  --connections N         concurrent ones\n"
          "  --sessions N | --seconds T\n"
          "  --rate R                open loop: sessions (load) or questions (pingpong) a second\n"
          "  --warm-up N             load: so many sessions first, unmeasured\n"
          "  --beside                load: others send to the sink too, so it may have more\n"
          "  --release               idle: then the clients leave, and what the proxy keeps is measured\n"
          "  --messages N --bytes N --pipelining     of a session\n"
          "  --starttls              load: the client encrypts, through the proxy\n"
          "  --megabytes N --download                bulk\n"
          "  --certificate FILE --key FILE           sink: offer STARTTLS\n"
          "  --watch PID[,PID]       process trees to report on; --sink-pid PID\n"
          "  --core N                run on this core only\n"
          "load: sessions that send mail. pingpong: NOOPs on open sessions. bulk: octets one way. idle: open, then\n"
          "hold for --seconds (0: until standard input ends). permits: sessions that ask for --messages permits, and again.\n"
          "One JSON object on standard output.\n",
          stderr);
    exit(64);
}

static struct sockaddr_in parse_address(const char *text)
{
    char host[64];
    const char *colon = strrchr(text, ':');
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (!colon || colon - text >= (long)sizeof host)
        usage();
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    address.sin_port = htons((uint16_t)atoi(colon + 1));
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        usage();
    return address;
}

static enum handshake parse_handshake(const char *name)
{
    static const char *const names[] = {"none", "v1", "v2", "socks5", "native"};
    for (int i = 0; i < 5; i++)
        if (!strcmp(name, names[i]))
            return (enum handshake)i;
    usage();
}

static void parse_watched(char *list)
{
    for (char *word = strtok(list, ","); word && opt.watched_count < MAX_WATCHED; word = strtok(NULL, ","))
        opt.watched[opt.watched_count++] = atoi(word);
}

static void parse_fds(char *list)
{
    for (char *word = strtok(list, ","); word && opt.fd_count < MAX_FDS; word = strtok(NULL, ","))
        opt.fds[opt.fd_count++] = atoi(word);
}

static void parse_incarnations(char *list)
{
    int count = 0;
    for (char *word = strtok(list, ","); word && count < MAX_FDS; word = strtok(NULL, ","))
        opt.incarnations[count++] = (uint32_t)strtoul(word, NULL, 10);
}

static void run_on_core(size_t core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("--core");
}

static void parse_options(int argc, char **argv)
{
    enum { TARGET = 256, PROXY, HANDSHAKE, USER, PASSWORD, BIND, CONNECTIONS, SESSIONS, SECONDS, RATE, MESSAGES, BYTES,
           PIPELINING, MEGABYTES, DOWN, WATCH, SINK_PID, CORE, CERTIFICATE, KEY, ENCRYPT,
           FDS, INCARNATIONS, WARM_UP, RELEASE, BESIDE, BROUGHT_UP };
    static const struct option table[] = {
        {"target", 1, 0, TARGET}, {"proxy", 1, 0, PROXY}, {"handshake", 1, 0, HANDSHAKE}, {"user", 1, 0, USER},
        {"password", 1, 0, PASSWORD}, {"bind", 0, 0, BIND}, {"connections", 1, 0, CONNECTIONS},
        {"sessions", 1, 0, SESSIONS}, {"seconds", 1, 0, SECONDS}, {"rate", 1, 0, RATE}, {"messages", 1, 0, MESSAGES},
        {"bytes", 1, 0, BYTES}, {"pipelining", 0, 0, PIPELINING}, {"megabytes", 1, 0, MEGABYTES},
        {"download", 0, 0, DOWN}, {"watch", 1, 0, WATCH}, {"sink-pid", 1, 0, SINK_PID}, {"core", 1, 0, CORE},
        {"certificate", 1, 0, CERTIFICATE}, {"key", 1, 0, KEY}, {"starttls", 0, 0, ENCRYPT},
        {"fds", 1, 0, FDS}, {"incarnations", 1, 0, INCARNATIONS}, {"warm-up", 1, 0, WARM_UP},
        {"release", 0, 0, RELEASE}, {"beside", 0, 0, BESIDE}, {"brought-up", 0, 0, BROUGHT_UP}, {0},
    };
    opt.target = parse_address("127.0.4.1:2525");
    inet_pton(AF_INET, "127.0.2.1", &opt.first_source);
    inet_pton(AF_INET, "127.0.3.1", &opt.first_client);
    for (int key; (key = getopt_long(argc, argv, "", table, NULL)) != -1;)
        switch (key) {
        case TARGET: opt.target = parse_address(optarg); break;
        case PROXY: opt.proxy = parse_address(optarg); break;
        case HANDSHAKE: opt.handshake = parse_handshake(optarg); break;
        case USER: opt.user = optarg; break;
        case PASSWORD: opt.password = optarg; break;
        case BIND: opt.bind_first = true; break;
        case CONNECTIONS: opt.connections = atoi(optarg); break;
        case SESSIONS: opt.sessions = atol(optarg); break;
        case SECONDS: opt.seconds = atof(optarg); break;
        case RATE: opt.rate = atof(optarg); break;
        case MESSAGES: opt.messages = atoi(optarg); break;
        case BYTES: opt.message_bytes = (size_t)atol(optarg); break;
        case PIPELINING: opt.pipelining = true; break;
        case MEGABYTES: opt.megabytes = atof(optarg); break;
        case DOWN: opt.download = true; break;
        case WATCH: parse_watched(optarg); break;
        case SINK_PID: opt.sink_pid = atoi(optarg); break;
        case CORE: run_on_core((size_t)atoi(optarg)); break;
        case CERTIFICATE: opt.certificate = optarg; break;
        case KEY: opt.key = optarg; break;
        case WARM_UP: opt.warm_up = atol(optarg); break;
        case BESIDE: opt.beside = true; break;
        case RELEASE: opt.release = true; break;
        case FDS: parse_fds(optarg); break;
        case INCARNATIONS: parse_incarnations(optarg); break;
        case ENCRYPT: opt.starttls = true; break;
        case BROUGHT_UP: opt.brought_up = true; break;
        default: usage();
        }
    if (!opt.certificate != !opt.key || (opt.handshake == HS_NATIVE && opt.fd_count < opt.connections))
        usage();
    if (!opt.proxy.sin_family)
        opt.proxy = opt.target;
    if (opt.user && (!opt.password || strlen(opt.user) > MAX_SECRET || strlen(opt.password) > MAX_SECRET))
        usage();
    if (opt.connections < 1 || opt.messages < 1 || opt.sessions < 0)
        usage();
}

/* --- measuring --- */

struct mark { double time, machine, self, slab; struct usage proxy, sink; };

static struct mark take_mark(bool with_memory)
{
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    return (struct mark){
        .proxy = tree_usage(opt.watched, opt.watched_count, with_memory),
        .sink = tree_usage(&opt.sink_pid, opt.sink_pid ? 1 : 0, false),
        .self = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
                (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) * 1e-6,
        .machine = machine_cpu(),
        .slab = with_memory ? slab_kb() : 0,
        .time = now(),
    };
}

/* The keys that every mode reports. A unit is a session, a round trip, a megabyte or a connection. */
static void report(const char *mode, const char *unit, double units, struct mark from, struct mark to)
{
    double seconds = to.time - from.time, per_unit = units > 0 ? 1e6 / units : 0;
    double cpu = to.proxy.cpu - from.proxy.cpu;
    printf("{\"mode\": \"%s\", \"unit\": \"%s\", \"units\": %.0f, \"seconds\": %.3f, \"errors\": %ld, "
           "\"units_per_second\": %.1f, \"cpu_us_per_unit\": %.3f, \"machine_us_per_unit\": %.3f, "
           "\"proxy_cpu_seconds\": %.3f, \"proxy_kernel_share\": %.3f, \"proxy_core_use\": %.3f, "
           "\"sink_cpu_seconds\": %.3f, \"load_cpu_seconds\": %.3f, \"processes\": %d, \"rss_kb\": %.0f",
           mode, unit, units, seconds, totals.errors, units / seconds, cpu * per_unit,
           (to.machine - from.machine) * per_unit, cpu, cpu > 0 ? (to.proxy.system - from.proxy.system) / cpu : 0,
           cpu / seconds, to.sink.cpu - from.sink.cpu, to.self - from.self, to.proxy.processes, to.proxy.rss_kb);
}

/* What the client's own handshakes cost, and what a session then costs both. */
static void report_own_tls(double seconds, double proxy)
{
    double per_unit = totals.done > 0 ? 1e6 / (double)totals.done : 0;
    printf(", \"own_tls_us_per_unit\": %.3f, \"with_own_tls_us_per_unit\": %.3f", seconds * per_unit,
           (seconds + proxy) * per_unit);
}

static void report_latency(const char *name, struct samples *s)
{
    printf(", \"%s_p50_us\": %.1f, \"%s_p99_us\": %.1f, \"%s_max_us\": %.1f", name, sample_at(s, 0.5), name,
           sample_at(s, 0.99), name, sample_at(s, 1.0));
}

/* --- what the sink says of it --- */

/* Asks the sink itself, past the proxy. */
static struct sink_counts ask_sink(void)
{
    struct sink_counts counts;
    char line[256];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&opt.target, sizeof opt.target))
        die("the sink");
    FILE *sink = fdopen(fd, "r+");
    if (!sink || !fgets(line, sizeof line, sink))
        die("the sink's greeting");
    fputs("STAT\r\n", sink);
    fflush(sink);
    if (!fgets(line, sizeof line, sink) || sscanf(line, "250 %ld %lld %ld %ld", &counts.messages, &counts.octets,
                                                  &counts.connections, &counts.handshakes) != 4)
        die("the sink's counts");
    fclose(sink);
    return counts;
}

/* Every message that a client was told is accepted must be there, whole, and none twice: as far as can be told. */
static void check_sink(struct sink_counts from, struct sink_counts to)
{
    long messages = to.messages - from.messages;
    long long octets = to.octets - from.octets, wanted = totals.messages * (long long)(opt.message_bytes + 3);
    bool more = messages > totals.messages || octets > wanted;
    if (messages < totals.messages || octets < wanted || (more && totals.errors == 0 && !opt.beside)) {
        fprintf(stderr, "loadgen: the sink has %ld messages of %lld octets, sent were %ld of %lld\n", messages, octets,
                totals.messages, wanted);
        exit(1);
    }
    double sessions_done = totals.done ? (double)totals.done : 1;
    printf(", \"messages\": %ld, \"mx_connections_per_unit\": %.3f, \"mx_handshakes_per_unit\": %.3f", messages,
           (double)(to.connections - from.connections) / sessions_done,
           (double)(to.handshakes - from.handshakes) / sessions_done);
}

/* --- bringing many sessions up --- */

static void open_all(void)
{
    sessions_init(GOAL_PARK);
    sessions = calloc((size_t)opt.connections, sizeof *sessions);
    double last = now();
    for (long next = 0; totals.ready + totals.errors < opt.connections && now() - last < STALL;) {
        while (next < opt.connections && next - totals.ready - totals.errors < CONNECTING_AT_ONCE)
            session_start(&sessions[next++], now());
        if (wait_events(0.02))
            last = now();
    }
    if (totals.ready + totals.errors < opt.connections)
        totals.errors = opt.connections - totals.ready;  /* those that never answered */
}

/* --- load --- */

static double end_time;

static bool more_wanted(void)
{
    return opt.sessions ? totals.started < opt.sessions : now() < end_time;
}

static void restart(struct session *s)
{
    if (more_wanted())
        session_start(s, now());
}

static void closed_loop(void)
{
    on_free = restart;
    double last = now();
    for (long next = 0; next < opt.connections || totals.active || totals.leaving;) {
        while (next < opt.connections && next - totals.ready - totals.errors < CONNECTING_AT_ONCE && more_wanted())
            session_start(&sessions[next++], now());
        if (!more_wanted())
            next = opt.connections;
        if (wait_events(0.1))
            last = now();
        if (now() - last > STALL) {
            totals.errors += totals.active;
            return;
        }
    }
}

static struct session *free_session(void)
{
    static int at;
    for (int i = 0; i < opt.connections; i++) {
        at = (at + 1) % opt.connections;
        if (sessions[at].step == FREE)
            return &sessions[at];
    }
    return NULL;
}

/* Sessions begin on a timetable; their latency counts from the timetable, so a stall hides nothing. */
static void open_loop(void)
{
    double due = now(), last = due;
    while (more_wanted() || totals.active || totals.leaving) {
        for (; more_wanted() && now() >= due; due += 1 / opt.rate) {
            struct session *s = free_session();
            if (s)
                session_start(s, due);
            else
                totals.errors++;
        }
        double pause = more_wanted() ? due - now() : 0.1;
        if (pause > 0 && wait_events(pause))
            last = now();
        if (now() - last > STALL) {
            totals.errors += totals.active;
            return;
        }
    }
}

static void warm_up(void)
{
    long wanted = opt.sessions;
    opt.sessions = opt.warm_up;
    closed_loop();
    opt.sessions = wanted;
    if (totals.errors)
        fprintf(stderr, "loadgen: %ld errors in the warm-up\n", totals.errors);
    free(totals.session_us.value);
    free(totals.setup_us.value);
    totals = (struct totals){0};
}

static void run_load(void)
{
    sessions_init(GOAL_MAIL);
    sessions = calloc((size_t)opt.connections, sizeof *sessions);
    if (opt.warm_up)
        warm_up();
    struct sink_counts accepted = ask_sink();
    double handshakes = tls_seconds;
    struct mark from = take_mark(false);
    end_time = from.time + opt.seconds;
    if (opt.rate > 0)
        open_loop();
    else
        closed_loop();
    struct mark to = take_mark(false);
    report("load", "session", (double)totals.done, from, to);
    check_sink(accepted, ask_sink());
    report_own_tls(tls_seconds - handshakes, to.proxy.cpu - from.proxy.cpu);
    report_latency("session", &totals.session_us);
    report_latency("setup", &totals.setup_us);
}

/* --- pingpong --- */

static void ask_again(struct session *s)
{
    double t = now();
    if (t < end_time)
        session_ask(s, t);
}

static void ask_on_timetable(void)
{
    double due = now();
    for (int at = 0; now() < end_time;) {
        for (; now() >= due && due < end_time; due += 1 / opt.rate, at = (at + 1) % opt.connections) {
            if (sessions[at].step == PARKED)
                session_ask(&sessions[at], due);
            else
                totals.errors++;  /* the last question of a whole round ago is still unanswered */
        }
        double pause = due - now();
        if (pause > 0)
            wait_events(pause);
    }
}

static void run_pingpong(void)
{
    open_all();
    struct mark from = take_mark(false);
    end_time = from.time + opt.seconds;
    if (opt.rate > 0) {
        ask_on_timetable();
    } else {
        on_answer = ask_again;
        for (int i = 0; i < opt.connections; i++)
            if (sessions[i].step == PARKED)
                session_ask(&sessions[i], now());
        while (now() < end_time)
            wait_events(0.05);
    }
    struct mark to = take_mark(false);
    report("pingpong", "round trip", (double)totals.round_trips, from, to);
    report_latency("round_trip", &totals.round_trip_us);
}

/* --- bulk --- */

static void run_bulk(void)
{
    open_all();
    int64_t share = (int64_t)(opt.megabytes * 1e6 / opt.connections);
    struct mark from = take_mark(false);
    for (int i = 0; i < opt.connections; i++)
        if (sessions[i].step == PARKED)
            session_bulk(&sessions[i], share);
    for (double last = now(); totals.active && now() - last < STALL;)
        if (wait_events(0.1))
            last = now();
    struct mark to = take_mark(false);
    totals.errors += totals.active;
    report("bulk", "MB", (double)totals.done * (double)share / 1e6, from, to);
}

/* --- permits --- */

static void run_permits(void)
{
    permits_begin();
    struct mark from = take_mark(false);
    long permits = permits_run(opt.seconds);
    struct mark to = take_mark(false);
    report("permits", "permit", (double)permits, from, to);
    report_latency("permit", &totals.round_trip_us);
}

/* --- idle --- */

static void hold_until_input_ends(void)
{
    printf("ready %ld\n", totals.ready);
    fflush(stdout);
    while (getchar() != EOF)
        ;
}

/* All clients say QUIT; what the proxy then holds for them are connections to the MX that it keeps. */
static void release_all(struct mark before, long connections)
{
    for (int i = 0; i < opt.connections; i++)
        if (sessions[i].step == PARKED)
            session_quit(&sessions[i]);
    for (double last = now(); totals.active && now() - last < STALL;)
        if (wait_events(0.1))
            last = now();
    totals.errors += totals.active;
    for (double end = now() + opt.seconds; now() < end;)
        wait_events(end - now());
    struct mark after = take_mark(true);
    printf(", \"kept\": %ld, \"kb_per_kept\": %.3f", connections,
           (after.proxy.pss_kb - before.proxy.pss_kb) / (connections ? (double)connections : 1));
}

static void run_idle(void)
{
    long connections = opt.release ? ask_sink().connections : 0;
    struct mark before = take_mark(true);
    open_all();
    struct mark opened = take_mark(true);
    if (opt.seconds == 0) {
        hold_until_input_ends();
        return;
    }
    for (double end = now() + opt.seconds; now() < end;)
        wait_events(end - now());
    struct mark held = take_mark(true);
    double units = totals.ready ? (double)totals.ready : 1;
    report("idle", "connection", (double)totals.ready, before, opened);
    printf(", \"kb_per_connection\": %.3f, \"rss_kb_per_connection\": %.3f, \"slab_kb_per_connection\": %.3f, "
           "\"pss_kb_before\": %.0f, \"pss_kb_after\": %.0f, \"idle_cpu_percent\": %.3f",
           (held.proxy.pss_kb - before.proxy.pss_kb) / units, (held.proxy.rss_kb - before.proxy.rss_kb) / units,
           (held.slab - before.slab) / units, before.proxy.pss_kb, held.proxy.pss_kb,
           (held.proxy.cpu - opened.proxy.cpu) / (held.time - opened.time) * 100);
    if (opt.release)
        release_all(before, ask_sink().connections - connections);
}

static void allow_many_files(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        usage();
    const char *mode = argv[1];
    parse_options(argc - 1, argv + 1);
    allow_many_files();
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(mode, "sink"))
        run_sink();
    else if (!strcmp(mode, "load"))
        run_load();
    else if (!strcmp(mode, "pingpong"))
        run_pingpong();
    else if (!strcmp(mode, "bulk"))
        run_bulk();
    else if (!strcmp(mode, "idle"))
        run_idle();
    else if (!strcmp(mode, "permits"))
        run_permits();
    else
        usage();
    if (strcmp(mode, "idle") || opt.seconds > 0)
        printf("}\n");
    return 0;
}
