/*
 * The load generator: one thread, epoll, one request text sent over and over, latencies and event delays counted.
 *
 *   load closed  --port N --request FILE --connections C --warmup S --seconds S
 *       C connections, each sends its next request when it has the whole answer.
 *   load open    --port N --request FILE --rate R --warmup S --seconds S
 *       R requests a second at planned moments; a latency counts from the planned moment, not from the sending, so a
 *       gateway that stalls is charged for everyone who had to wait.
 *   load streams --port N --request FILE --connections C --open-within S --seconds S
 *       opens C streams, reads them for S seconds, then leaves all at once without reading to the end.
 *
 * FILE holds the whole HTTP request. The last run of 12 zeros in it is overwritten by the number of the request, so
 * that no two bodies are equal. Two lines of JSON come out: {"phase":"begin",…} when the measured time starts and
 * {"phase":"end",…} with the results, written the moment it is over.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CONNECTIONS_MAX = 16384,
    HEAD_BYTES_MAX = 16384,
    SAMPLES_MAX = 8 << 20,
    SEQUENCE_DIGITS = 12,
    STAMP_DIGITS = 16,
    /* Streams asked for and not yet answered. More at once would measure the accept queue. */
    OPENING_MAX = 64,
    OPEN_LOOP_WARM_CONNECTIONS = 8,
    EPOLL_BATCH = 256,
};
/* How long an open loop waits for answers after the last planned request. */
static const double GRACE_S = 3;

enum body_state { READ_HEAD, READ_FIXED, CHUNK_SIZE, CHUNK_DATA, CHUNK_DATA_END, CHUNK_LAST };
enum mode { CLOSED, OPEN, STREAMS };

struct conn {
    int fd; /* -1: not open */
    bool connected, busy, watching_out, answered, close_after;
    char *request;
    size_t sent; /* of the request */
    uint64_t started_ns;
    enum body_state state;
    char head[HEAD_BYTES_MAX];
    size_t head_len;
    uint64_t left; /* of the fixed body or of the chunk */
    int status;
    int line_len;  /* of the trailer line being read */
    int stamp_at;  /* digits of a stamp read so far; -1: not within one */
    uint64_t stamp;
    struct conn *idle_next;
};

static enum mode mode;
static int port;
static char *request;
static size_t request_len, sequence_at;
static uint64_t sequence;
static int epoll_fd;
static struct conn *conns;
static int conns_len;
static struct conn *idle;

static bool measuring;
static uint64_t completed, events_seen, bytes_read, errors, first_bad_status;
static int streams_answered, streams_opening, streams_lost;
static uint32_t *latencies_us, *delays_us;
static size_t latencies_len, delays_len;

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void sample(uint32_t *to, size_t *len, uint64_t ns) {
    if (*len < SAMPLES_MAX) to[(*len)++] = ns / 1000 > UINT32_MAX ? UINT32_MAX : (uint32_t)(ns / 1000);
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Nearest rank: the smallest sample with at least this share of all samples at or below it. */
static double percentile_ms(const uint32_t *sorted, size_t len, double share) {
    if (!len) return 0;
    size_t rank = (size_t)(share * (double)len);
    if ((double)rank < share * (double)len) rank++;
    return sorted[rank ? rank - 1 : 0] / 1000.0;
}

/* --- connections --- */

static void watch(struct conn *c, bool out) {
    if (c->watching_out == out) return;
    c->watching_out = out;
    struct epoll_event ev = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &ev) < 0) die("epoll_ctl");
}

static void conn_open(struct conn *c) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) die("connect");
    c->fd = fd;
    c->connected = false;
    c->watching_out = true;
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0) die("epoll_ctl");
}

static void conn_drop(struct conn *c) {
    close(c->fd);
    c->fd = -1;
    c->busy = false;
}

static void conn_failed(struct conn *c) {
    conn_drop(c);
    errors++;
    if (mode != STREAMS) return;
    streams_lost++;
    if (!c->answered) streams_opening--;
}

static void conn_send(struct conn *c) {
    while (c->sent < request_len) {
        ssize_t n = send(c->fd, c->request + c->sent, request_len - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) watch(c, true);
            else conn_failed(c);
            return;
        }
        c->sent += (size_t)n;
    }
    watch(c, false);
}

static void conn_start(struct conn *c, uint64_t started_ns) {
    if (!c->request) {
        c->request = malloc(request_len);
        if (!c->request) die("malloc");
        memcpy(c->request, request, request_len);
    }
    uint64_t number = ++sequence;
    for (int i = SEQUENCE_DIGITS - 1; i >= 0; i--) {
        c->request[sequence_at + (size_t)i] = (char)('0' + number % 10);
        number /= 10;
    }
    c->busy = true;
    c->answered = false;
    c->sent = 0;
    c->started_ns = started_ns;
    c->state = READ_HEAD;
    c->head_len = 0;
    c->stamp_at = -1;
    if (c->fd < 0) conn_open(c);
    else if (c->connected) conn_send(c);
}

static struct conn *conn_idle(void) {
    struct conn *c = idle;
    if (c) idle = c->idle_next;
    else if (conns_len < CONNECTIONS_MAX) {
        c = &conns[conns_len++];
        c->fd = -1;
    }
    return c;
}

static void conn_done(struct conn *c, uint64_t now) {
    if (c->status != 200 && !first_bad_status) first_bad_status = (uint64_t)c->status;
    if (mode == STREAMS) {
        conn_failed(c); /* an endless stream that ended is a lost one */
        return;
    }
    if (c->status != 200) {
        errors++;
    } else if (measuring) {
        completed++;
        sample(latencies_us, &latencies_len, now - c->started_ns);
    }
    c->busy = false;
    if (c->close_after) conn_drop(c);
    if (mode == CLOSED) {
        conn_start(c, now);
    } else {
        c->idle_next = idle;
        idle = c;
    }
}

/* --- reading answers --- */

/* The value of a header line with this name in lower case, colon included; or NULL. */
static const char *line_value(const char *line, const char *name) {
    while (*name && (*line | 32) == (*name | 32)) line++, name++;
    if (*name) return NULL;
    while (*line == ' ') line++;
    return line;
}

static void head_parse(struct conn *c) {
    c->head[c->head_len] = 0;
    c->status = c->head_len > 12 ? atoi(c->head + 9) : 0;
    c->close_after = false;
    c->state = READ_FIXED;
    c->left = 0;
    for (const char *line = c->head; (line = strchr(line, '\n')) && *++line;) {
        const char *value;
        if ((*line | 32) != 'c' && (*line | 32) != 't') continue;
        if ((value = line_value(line, "content-length:"))) c->left = strtoull(value, NULL, 10);
        else if ((value = line_value(line, "connection:"))) c->close_after = !strncasecmp(value, "close", 5);
        else if (line_value(line, "transfer-encoding:")) c->state = CHUNK_SIZE;
    }
    if (c->state == CHUNK_SIZE) c->left = 0;
}

/* Finds the stamps (an at sign, 16 digits, an at sign) in text that comes in any pieces. */
static void stamps_scan(struct conn *c, const char *p, size_t n, uint64_t now) {
    const char *end = p + n;
    while (p < end) {
        if (c->stamp_at < 0) {
            p = memchr(p, '@', (size_t)(end - p));
            if (!p) return;
            p++;
            c->stamp_at = 0;
            c->stamp = 0;
        } else if (c->stamp_at < STAMP_DIGITS) {
            if (*p < '0' || *p > '9') {
                c->stamp_at = -1;
                continue;
            }
            c->stamp = c->stamp * 10 + (uint64_t)(*p++ - '0');
            c->stamp_at++;
        } else {
            p++;
            c->stamp_at = -1;
            if (!c->answered) {
                c->answered = true;
                if (mode == STREAMS) {
                    streams_answered++;
                    streams_opening--;
                }
            }
            if (measuring) {
                events_seen++;
                uint64_t sent_ns = c->stamp * 1000;
                sample(delays_us, &delays_len, now > sent_ns ? now - sent_ns : 0);
            }
        }
    }
}

/* Reads one answer out of the bytes; returns how many it took. True in *whole: it was the end of the answer. */
static size_t answer_feed(struct conn *c, const char *bytes, size_t n, uint64_t now, bool *whole) {
    size_t at = 0;
    *whole = false;
    while (at < n) {
        switch (c->state) {
        case READ_HEAD: {
            const char *head_end = c->head_len ? NULL : memmem(bytes + at, n - at, "\r\n\r\n", 4);
            size_t take = head_end ? (size_t)(head_end + 4 - (bytes + at)) : 1; /* a split head: byte by byte */
            if (c->head_len + take >= HEAD_BYTES_MAX) {
                fprintf(stderr, "load: answer head above %d bytes\n", HEAD_BYTES_MAX);
                exit(1);
            }
            memcpy(c->head + c->head_len, bytes + at, take);
            c->head_len += take;
            at += take;
            if (c->head_len >= 4 && !memcmp(c->head + c->head_len - 4, "\r\n\r\n", 4)) {
                head_parse(c);
                if (c->state == READ_FIXED && !c->left) {
                    *whole = true;
                    return at;
                }
            }
            break;
        }
        case READ_FIXED: {
            size_t take = n - at < c->left ? n - at : (size_t)c->left;
            at += take;
            c->left -= take;
            if (!c->left) {
                *whole = true;
                return at;
            }
            break;
        }
        case CHUNK_SIZE: {
            char b = bytes[at++];
            if (b == '\n') {
                c->state = c->left ? CHUNK_DATA : CHUNK_LAST;
                c->line_len = 0;
            } else if (b >= '0' && b <= '9') c->left = c->left * 16 + (uint64_t)(b - '0');
            else if ((b | 32) >= 'a' && (b | 32) <= 'f') c->left = c->left * 16 + (uint64_t)((b | 32) - 'a' + 10);
            break;
        }
        case CHUNK_DATA: {
            size_t take = n - at < c->left ? n - at : (size_t)c->left;
            stamps_scan(c, bytes + at, take, now);
            at += take;
            c->left -= take;
            if (!c->left) c->state = CHUNK_DATA_END;
            break;
        }
        case CHUNK_DATA_END:
            if (bytes[at++] == '\n') c->state = CHUNK_SIZE;
            break;
        case CHUNK_LAST: {
            char b = bytes[at++];
            if (b != '\n') c->line_len += b != '\r';
            else if (!c->line_len) {
                *whole = true;
                return at;
            } else c->line_len = 0;
            break;
        }
        }
    }
    return at;
}

static void conn_read(struct conn *c) {
    static char buffer[256 << 10];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        /* A kept-alive connection that the gateway closes between two requests is no error: open it anew. */
        if (n == 0 && !c->busy) conn_drop(c);
        else {
            conn_failed(c);
            if (mode == CLOSED) conn_start(c, now_ns());
        }
        return;
    }
    if (measuring) bytes_read += (uint64_t)n;
    uint64_t now = now_ns();
    size_t at = 0;
    while (at < (size_t)n && c->busy) {
        bool whole;
        at += answer_feed(c, buffer + at, (size_t)n - at, now, &whole);
        if (whole) {
            conn_done(c, now);
            if (c->fd < 0) return;
        }
    }
}

static void conn_event(struct conn *c, uint32_t events) {
    if (c->fd < 0) return;
    if (!c->connected) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            conn_failed(c);
            return;
        }
        c->connected = true;
        watch(c, false);
        if (c->busy) conn_send(c);
    } else if (events & EPOLLOUT) {
        conn_send(c);
    }
    if (c->fd >= 0 && (events & (EPOLLIN | EPOLLERR | EPOLLHUP))) conn_read(c);
}

/* Serves the sockets until something happened or the moment has come. */
static void serve_until(uint64_t until_ns) {
    struct epoll_event events[EPOLL_BATCH];
    uint64_t now = now_ns();
    uint64_t wait_ns = until_ns > now ? until_ns - now : 0;
    struct timespec wait = {.tv_sec = (time_t)(wait_ns / 1000000000u), .tv_nsec = (long)(wait_ns % 1000000000u)};
    int n = epoll_pwait2(epoll_fd, events, EPOLL_BATCH, &wait, NULL);
    if (n < 0 && errno != EINTR) die("epoll_pwait2");
    for (int i = 0; i < n; i++) conn_event(events[i].data.ptr, events[i].events);
}

/* --- the three kinds of load --- */

static uint64_t after(double seconds) { return now_ns() + (uint64_t)(seconds * 1e9); }

static uint64_t begin(void) {
    measuring = true;
    printf("{\"phase\":\"begin\",\"streams\":%d}\n", streams_answered);
    fflush(stdout);
    return now_ns();
}

static void end(uint64_t began_ns, uint64_t planned) {
    double seconds = (double)(now_ns() - began_ns) / 1e9;
    measuring = false;
    qsort(latencies_us, latencies_len, sizeof *latencies_us, by_value);
    qsort(delays_us, delays_len, sizeof *delays_us, by_value);
    printf("{\"phase\":\"end\",\"seconds\":%.6f,\"planned\":%llu,\"completed\":%llu,\"errors\":%llu,"
           "\"first_bad_status\":%llu,\"bytes\":%llu,\"latency_p50_ms\":%.3f,\"latency_p99_ms\":%.3f,"
           "\"latency_max_ms\":%.3f,\"streams\":%d,\"streams_lost\":%d,\"events\":%llu,\"delay_p50_ms\":%.3f,"
           "\"delay_p99_ms\":%.3f}\n",
           seconds, (unsigned long long)planned, (unsigned long long)completed, (unsigned long long)errors,
           (unsigned long long)first_bad_status, (unsigned long long)bytes_read,
           percentile_ms(latencies_us, latencies_len, 0.50), percentile_ms(latencies_us, latencies_len, 0.99),
           percentile_ms(latencies_us, latencies_len, 1.0), streams_answered, streams_lost,
           (unsigned long long)events_seen, percentile_ms(delays_us, delays_len, 0.50),
           percentile_ms(delays_us, delays_len, 0.99));
    fflush(stdout);
}

static void run_closed(int connections, double warmup_s, double seconds) {
    for (int i = 0; i < connections; i++) conn_start(conn_idle(), now_ns());
    for (uint64_t until = after(warmup_s); now_ns() < until;) serve_until(until);
    uint64_t began = begin();
    for (uint64_t until = after(seconds); now_ns() < until;) serve_until(until);
    end(began, 0);
}

static void run_open(double rate, double warmup_s, double seconds) {
    mode = CLOSED;
    for (int i = 0; i < OPEN_LOOP_WARM_CONNECTIONS; i++) conn_start(conn_idle(), now_ns());
    for (uint64_t until = after(warmup_s); now_ns() < until;) serve_until(until);
    mode = OPEN;
    uint64_t drained = after(GRACE_S);
    for (bool busy = true; busy && now_ns() < drained;) {
        serve_until(drained);
        busy = false;
        for (int i = 0; i < conns_len; i++) busy |= conns[i].busy;
    }
    errors = 0;
    uint64_t began = begin(), planned = (uint64_t)(rate * seconds), started = 0;
    uint64_t give_up = began + (uint64_t)((seconds + GRACE_S) * 1e9);
    while (completed + errors < planned && now_ns() < give_up) {
        uint64_t now = now_ns(), next = give_up;
        while (started < planned) {
            uint64_t due = began + (uint64_t)((double)started * 1e9 / rate);
            if (due > now) {
                next = due;
                break;
            }
            struct conn *c = conn_idle();
            if (!c) break;
            conn_start(c, due);
            started++;
        }
        serve_until(next);
    }
    end(began, planned);
}

static void run_streams(int streams, double open_within_s, double seconds) {
    int asked = 0;
    for (uint64_t until = after(open_within_s); streams_answered + streams_lost < streams && now_ns() < until;) {
        while (asked < streams && streams_opening < OPENING_MAX) {
            conn_start(conn_idle(), now_ns());
            asked++;
            streams_opening++;
        }
        serve_until(until);
    }
    uint64_t began = begin();
    for (uint64_t until = after(seconds); now_ns() < until;) serve_until(until);
    for (int i = 0; i < conns_len; i++)
        if (conns[i].fd >= 0) close(conns[i].fd);
    end(began, 0);
}

/* --- command line --- */

static void read_request(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) die(path);
    fseek(f, 0, SEEK_END);
    request_len = (size_t)ftell(f);
    rewind(f);
    request = malloc(request_len);
    if (!request || fread(request, 1, request_len, f) != request_len) die(path);
    fclose(f);
    for (size_t i = 0; i + SEQUENCE_DIGITS <= request_len; i++)
        if (!memcmp(request + i, "000000000000", SEQUENCE_DIGITS)) sequence_at = i;
    if (!sequence_at) {
        fprintf(stderr, "load: no run of %d zeros in %s\n", SEQUENCE_DIGITS, path);
        exit(2);
    }
}

int main(int argc, char **argv) {
    double rate = 0, warmup_s = 0, seconds = 1, open_within_s = 10;
    int connections = 1;
    const char *kind = argc > 1 ? argv[1] : "", *path = NULL;
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--request")) path = value;
        else if (!strcmp(name, "--connections")) connections = atoi(value);
        else if (!strcmp(name, "--rate")) rate = atof(value);
        else if (!strcmp(name, "--warmup")) warmup_s = atof(value);
        else if (!strcmp(name, "--seconds")) seconds = atof(value);
        else if (!strcmp(name, "--open-within")) open_within_s = atof(value);
        else path = NULL, port = 0, i = argc;
    }
    if (!port || !path || connections < 1 || connections > CONNECTIONS_MAX) {
        fprintf(stderr, "usage: load closed|open|streams --port N --request FILE …\n");
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* never outlives the measurement that started it */
    read_request(path);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc(CONNECTIONS_MAX, sizeof *conns);
    latencies_us = malloc(sizeof *latencies_us * SAMPLES_MAX);
    delays_us = malloc(sizeof *delays_us * SAMPLES_MAX);
    if (!conns || !latencies_us || !delays_us) die("malloc");

    if (!strcmp(kind, "closed")) mode = CLOSED, run_closed(connections, warmup_s, seconds);
    else if (!strcmp(kind, "open") && rate > 0) mode = OPEN, run_open(rate, warmup_s, seconds);
    else if (!strcmp(kind, "streams")) mode = STREAMS, run_streams(connections, open_within_s, seconds);
    else return 2;
    return 0;
}
