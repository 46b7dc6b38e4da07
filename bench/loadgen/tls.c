/* tls.c - see tls.h. One process is a server or a client, so there is one context. */
#define _GNU_SOURCE
#include "tls.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

double tls_seconds;

static SSL_CTX *context;
static bool serving;

static double cpu_time(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

_Noreturn static void give_up(const char *what)
{
    fprintf(stderr, "loadgen: %s: ", what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static void make_context(const SSL_METHOD *method)
{
    context = SSL_CTX_new(method);
    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION))
        give_up("TLS");
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
}

void tls_server(const char *certificate, const char *key)
{
    serving = true;
    make_context(TLS_server_method());
    SSL_CTX_set_num_tickets(context, 0);
    if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1)
        give_up(certificate);
}

void tls_client(void)
{
    make_context(TLS_client_method());
}

struct ssl_st *tls_new(int fd)
{
    double began = cpu_time();
    SSL *tls = SSL_new(context);
    if (!tls || !SSL_set_fd(tls, fd))
        give_up("TLS");
    if (serving)
        SSL_set_accept_state(tls);
    else
        SSL_set_connect_state(tls);
    tls_seconds += cpu_time() - began;
    return tls;
}

void tls_free(struct ssl_st *tls)
{
    SSL_free(tls);
}

/* What an SSL function's result is in terms of recv and send. */
static ssize_t result_of(SSL *tls, int result)
{
    if (result > 0)
        return result;
    int error = SSL_get_error(tls, result);
    ERR_clear_error();
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
    return -1;
}

enum shaking tls_shake(struct ssl_st *tls)
{
    double began = cpu_time();
    ssize_t result = result_of(tls, SSL_do_handshake(tls));
    tls_seconds += cpu_time() - began;
    return result > 0 ? TLS_DONE : result < 0 && errno == EAGAIN ? TLS_AGAIN : TLS_FAILED;
}

ssize_t tls_recv(struct ssl_st *tls, void *buffer, size_t length)
{
    return result_of(tls, SSL_read(tls, buffer, (int)length));
}

ssize_t tls_send(struct ssl_st *tls, const void *data, size_t length)
{
    return result_of(tls, SSL_write(tls, data, (int)length));
}
