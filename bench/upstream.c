/*
 * A stand-in for the Claude API that is cheap enough never to be the bottleneck of a measurement.
 *
 * It answers POST /v1/messages with a JSON message of about 1.3 KB or, when the body asks for a stream, with
 * server-sent events in Anthropic's grammar, each event one chunk. It checks nothing, bills nothing and limits
 * nothing: the simulator does that. One thread, epoll, no allocation on the path of a request once it is warm.
 *
 *   upstream --port N
 *   GET /bench/pace?rate=R           R events a second for each stream, endless; 0: 66 events at once, then the end.
 *   GET /bench/pace?rate=R&in_step   the same, all streams at the same moments.
 *                            Closes the streams that are open, so that one test does not burden the next.
 *   GET /bench/streams       {"open": streams now open, "skipped": events not written to a slow reader, "requests": n}
 *
 * The pace is steered here, and not by a header or the body, so that no gateway can lose or change it.
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
    EVENTS_UNPACED = 66,
    REQUEST_BYTES_MAX = 4 << 20,
    /* A reader this far behind loses events (counted as skipped) instead of growing our memory. */
    BACKLOG_BYTES_MAX = 256 << 10,
    EPOLL_BATCH = 256,
};

struct conn {
    int fd;
    char *in;
    size_t in_len, in_cap;
    char *out;
    size_t out_off, out_len, out_cap;
    bool streaming, watching_out;
    uint64_t due_ns;
    int heap_at; /* -1: not in the heap */
};

static int epoll_fd;
static uint64_t period_ns; /* 0: unpaced */
static bool in_step;
static uint64_t sequence;
static uint64_t requests, skipped;
static unsigned streams_open;

static struct conn **heap;
static int heap_len, heap_cap;

static struct conn *conns_by_fd[1 << 17];

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* --- the heap of streams, the next due on top --- */

static void heap_put(int at, struct conn *c) {
    heap[at] = c;
    c->heap_at = at;
}

static void heap_settle(int at) {
    struct conn *c = heap[at];
    while (at > 0 && heap[(at - 1) / 2]->due_ns > c->due_ns) {
        heap_put(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        int child = 2 * at + 1;
        if (child >= heap_len) break;
        if (child + 1 < heap_len && heap[child + 1]->due_ns < heap[child]->due_ns) child++;
        if (heap[child]->due_ns >= c->due_ns) break;
        heap_put(at, heap[child]);
        at = child;
    }
    heap_put(at, c);
}

static void heap_push(struct conn *c) {
    if (heap_len == heap_cap) {
        heap_cap = heap_cap ? heap_cap * 2 : 1024;
        heap = realloc(heap, sizeof *heap * (size_t)heap_cap);
        if (!heap) die("realloc");
    }
    heap_put(heap_len, c);
    heap_len++;
    heap_settle(heap_len - 1);
}

static void heap_remove(struct conn *c) {
    int at = c->heap_at;
    c->heap_at = -1;
    struct conn *last = heap[--heap_len];
    if (last == c) return;
    heap_put(at, last);
    heap_settle(at);
}

/* --- connections and their output --- */

static void conn_close(struct conn *c) {
    if (c->streaming) streams_open--;
    if (c->heap_at >= 0) heap_remove(c);
    conns_by_fd[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void watch(struct conn *c, bool out) {
    if (c->watching_out == out) return;
    c->watching_out = out;
    struct epoll_event ev = {.events = EPOLLIN | EPOLLRDHUP | (out ? EPOLLOUT : 0), .data.fd = c->fd};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &ev) < 0) die("epoll_ctl");
}

/* False: the connection is gone. */
static bool conn_flush(struct conn *c) {
    while (c->out_off < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_off, c->out_len - c->out_off, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                watch(c, true);
                return true;
            }
            conn_close(c);
            return false;
        }
        c->out_off += (size_t)n;
    }
    c->out_off = c->out_len = 0;
    watch(c, false);
    return true;
}

static char *out_reserve(struct conn *c, size_t n) {
    if (c->out_len + n > c->out_cap) {
        c->out_cap = (c->out_len + n) * 2;
        c->out = realloc(c->out, c->out_cap);
        if (!c->out) die("realloc");
    }
    return c->out + c->out_len;
}

static void out_add(struct conn *c, const char *bytes, size_t n) {
    memcpy(out_reserve(c, n), bytes, n);
    c->out_len += n;
}

/* --- what we answer --- */

#define RATE_LIMIT_HEADERS                                                  \
    "anthropic-ratelimit-requests-limit: 1000000000\r\n"                    \
    "anthropic-ratelimit-requests-remaining: 999999999\r\n"                 \
    "anthropic-ratelimit-requests-reset: 2100-01-01T00:00:00Z\r\n"          \
    "anthropic-ratelimit-input-tokens-limit: 1000000000000\r\n"             \
    "anthropic-ratelimit-input-tokens-remaining: 999999999000\r\n"          \
    "anthropic-ratelimit-input-tokens-reset: 2100-01-01T00:00:00Z\r\n"      \
    "anthropic-ratelimit-output-tokens-limit: 1000000000000\r\n"            \
    "anthropic-ratelimit-output-tokens-remaining: 999999999000\r\n"         \
    "anthropic-ratelimit-output-tokens-reset: 2100-01-01T00:00:00Z\r\n"     \
    "anthropic-organization-id: 00000000-0000-4000-8000-000000000000\r\n"

#define ID_HOLE "0000000000000000"

static const char json_body[] =
    "{\"id\":\"msg_bench_" ID_HOLE "\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-sonnet-4-6\","
    "\"content\":[{\"type\":\"text\",\"text\":\""
    "A headgate stands where a canal leaves the river, and it decides how much water goes in and when. When the river "
    "is high the gate is lowered, so that the banks below are not washed away; when it is low the gate is raised, and "
    "the fields are served in turn. The keeper reads the staff twice a day, writes the level in a book, and settles "
    "the account with each farmer at the end of the season.\\n\\nThree habits make the difference. First, the book is "
    "written before the gate is moved, so that a storm in the night cannot lose the record. Second, nobody is turned "
    "away at the gate without being told how long the wait will be. Third, the water that was promised to one field "
    "is never given to another, however loudly the other asks. The same three habits serve a gateway in front of a "
    "language model: write the intent first, queue instead of failing, and reserve what you have promised."
    "\"}],\"stop_reason\":\"end_turn\",\"stop_sequence\":null,\"usage\":{\"input_tokens\":312,"
    "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,\"cache_creation\":"
    "{\"ephemeral_5m_input_tokens\":0,\"ephemeral_1h_input_tokens\":0},\"output_tokens\":214,"
    "\"service_tier\":\"standard\"}}";

/* Head and body of the JSON answer, made once: only the two ids differ between answers. */
static char message_answer[4096];
static size_t message_answer_len, message_request_id_at, message_id_at;

static const char stream_head[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    "request-id: req_bench_" ID_HOLE "\r\n" RATE_LIMIT_HEADERS "transfer-encoding: chunked\r\n\r\n";

static const char event_message_start[] =
    "event: message_start\n"
    "data: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_bench_" ID_HOLE "\",\"type\":\"message\","
    "\"role\":\"assistant\",\"model\":\"claude-sonnet-4-6\",\"content\":[],\"stop_reason\":null,"
    "\"stop_sequence\":null,\"usage\":{\"input_tokens\":312,\"cache_creation_input_tokens\":0,"
    "\"cache_read_input_tokens\":0,\"cache_creation\":{\"ephemeral_5m_input_tokens\":0,"
    "\"ephemeral_1h_input_tokens\":0},\"output_tokens\":1,\"service_tier\":\"standard\"}}}\n\n";

static const char event_block_start[] =
    "event: content_block_start\n"
    "data: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";

/* Between the at signs: when the event was written, in microseconds of the monotonic clock. The load generator on the
 * same machine reads it and knows the delay. */
static const char event_delta[] =
    "event: content_block_delta\n"
    "data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":"
    "\"@" ID_HOLE "@ the gate was raised a hand's width\"}}\n\n";

static const char stream_tail_block_stop[] =
    "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n";
static const char stream_tail_message_delta[] =
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
    "\"stop_sequence\":null},\"usage\":{\"input_tokens\":312,\"cache_creation_input_tokens\":0,"
    "\"cache_read_input_tokens\":0,\"output_tokens\":214}}\n\n";
static const char stream_tail_message_stop[] = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

static void write_digits(char *at, uint64_t value) {
    for (int i = 15; i >= 0; i--) {
        at[i] = (char)('0' + value % 10);
        value /= 10;
    }
}

/* Adds a text with its hole (if it has one) filled by a number of 16 digits. */
static void out_add_filled(struct conn *c, const char *text, size_t n, uint64_t value) {
    size_t start = c->out_len;
    out_add(c, text, n);
    char *hole = memmem(c->out + start, n, ID_HOLE, 16);
    if (hole) write_digits(hole, value);
}

static void out_add_chunk(struct conn *c, const char *event, size_t n, uint64_t value) {
    char size[16];
    int digits = snprintf(size, sizeof size, "%zx\r\n", n);
    out_add(c, size, (size_t)digits);
    out_add_filled(c, event, n, value);
    out_add(c, "\r\n", 2);
}
#define CHUNK(c, event, value) out_add_chunk((c), (event), sizeof(event) - 1, (value))

static size_t json_answer(char *to, size_t room, const char *status, const char *body) {
    int n = snprintf(to, room,
                     "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n"
                     "request-id: req_bench_" ID_HOLE "\r\n" RATE_LIMIT_HEADERS "\r\n%s",
                     status, strlen(body), body);
    if (n < 0 || (size_t)n >= room) die("answer too long");
    return (size_t)n;
}

static void make_message_answer(void) {
    message_answer_len = json_answer(message_answer, sizeof message_answer, "200 OK", json_body);
    message_request_id_at = (size_t)(strstr(message_answer, ID_HOLE) - message_answer);
    message_id_at = (size_t)(strstr(message_answer + message_request_id_at + 16, ID_HOLE) - message_answer);
}

static void answer_message(struct conn *c) {
    char *at = out_reserve(c, message_answer_len);
    memcpy(at, message_answer, message_answer_len);
    write_digits(at + message_request_id_at, sequence);
    write_digits(at + message_id_at, sequence);
    c->out_len += message_answer_len;
}

static void answer_json(struct conn *c, const char *status, const char *body) {
    char text[2048];
    out_add_filled(c, text, json_answer(text, sizeof text, status, body), sequence);
}

static void answer_stream(struct conn *c) {
    out_add_filled(c, stream_head, sizeof stream_head - 1, sequence);
    CHUNK(c, event_message_start, sequence);
    CHUNK(c, event_block_start, 0);
    if (period_ns) {
        /* The first event goes out at once and the rest, unless all are to speak together, with a phase of its own:
         * Knuth's multiplicative hash spreads consecutive numbers. */
        uint64_t now = now_ns();
        CHUNK(c, event_delta, now / 1000);
        c->streaming = true;
        streams_open++;
        uint64_t phase = in_step ? period_ns - now % period_ns : (sequence * 2654435761u) % period_ns;
        c->due_ns = now + phase;
        heap_push(c);
        return;
    }
    for (int i = 0; i < EVENTS_UNPACED; i++) CHUNK(c, event_delta, now_ns() / 1000);
    CHUNK(c, stream_tail_block_stop, 0);
    CHUNK(c, stream_tail_message_delta, 0);
    CHUNK(c, stream_tail_message_stop, 0);
    out_add(c, "0\r\n\r\n", 5);
}

static void set_pace(double rate, bool together) {
    in_step = together;
    period_ns = rate > 0 ? (uint64_t)(1e9 / rate) : 0;
    while (heap_len) conn_close(heap[0]);
}

static void answer(struct conn *c, const char *head, size_t head_len, const char *body, size_t body_len) {
    static const char not_found[] =
        "{\"type\":\"error\",\"error\":{\"type\":\"not_found_error\",\"message\":\"Not found\"}}";
    sequence++;
    if (head_len > 18 && !memcmp(head, "POST /v1/messages", 17) && (head[17] == ' ' || head[17] == '?')) {
        requests++;
        if (memmem(body, body_len, "\"stream\":true", 13) || memmem(body, body_len, "\"stream\": true", 14))
            answer_stream(c);
        else
            answer_message(c);
    } else if (head_len > 21 && !memcmp(head, "GET /bench/pace?rate=", 21)) {
        char *after;
        double rate = strtod(head + 21, &after);
        set_pace(rate, !strncmp(after, "&in_step", 8));
        answer_json(c, "200 OK", "{}");
    } else if (head_len > 18 && !memcmp(head, "GET /bench/streams", 18)) {
        char text[128];
        snprintf(text, sizeof text, "{\"open\":%u,\"skipped\":%llu,\"requests\":%llu}", streams_open,
                 (unsigned long long)skipped, (unsigned long long)requests);
        answer_json(c, "200 OK", text);
    } else {
        answer_json(c, "404 Not Found", not_found);
    }
}

/* --- reading requests --- */

static const char *header_value(const char *head, size_t head_len, const char *name) {
    size_t name_len = strlen(name);
    const char *line = memchr(head, '\n', head_len);
    while (line && ++line < head + head_len) {
        if ((size_t)(head + head_len - line) > name_len && line[name_len] == ':' && !strncasecmp(line, name, name_len))
            return line + name_len + 1;
        line = memchr(line, '\n', (size_t)(head + head_len - line));
    }
    return NULL;
}

/* The bytes of the whole first request in the buffer, or 0 while it is incomplete. */
static size_t request_take(struct conn *c) {
    char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head_len = (size_t)(end - c->in) + 4;
    const char *body = c->in + head_len;
    size_t body_len = 0;
    const char *length = header_value(c->in, head_len, "content-length");
    if (length) {
        body_len = strtoul(length, NULL, 10);
        if (c->in_len < head_len + body_len) return 0;
    } else if (header_value(c->in, head_len, "transfer-encoding")) {
        /* Chunk framing is left in: only a search for "stream":true follows, and nobody pipelines here. */
        body_len = c->in_len - head_len;
        if (body_len < 5 || memcmp(c->in + c->in_len - 5, "0\r\n\r\n", 5)) return 0;
    }
    answer(c, c->in, head_len, body, body_len);
    return head_len + body_len;
}

static void conn_read(struct conn *c) {
    for (;;) {
        if (c->in_cap - c->in_len < 4096) {
            c->in_cap = c->in_cap ? c->in_cap * 2 : 32768;
            if (c->in_cap > REQUEST_BYTES_MAX) {
                conn_close(c);
                return;
            }
            c->in = realloc(c->in, c->in_cap + 1);
            if (!c->in) die("realloc");
        }
        size_t room = c->in_cap - c->in_len;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            conn_close(c);
            return;
        }
        if (n < 0) break;
        c->in_len += (size_t)n;
        c->in[c->in_len] = 0; /* strtoul and strtod stop here at the latest */
        if ((size_t)n < room) break;
    }
    size_t taken;
    while (!c->streaming && c->in_len && (taken = request_take(c))) {
        c->in_len -= taken;
        memmove(c->in, c->in + taken, c->in_len + 1);
    }
    conn_flush(c);
}

/* --- the loop --- */

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EAGAIN) return;
            if (errno == ECONNABORTED) continue;
            die("accept4");
        }
        if ((size_t)fd >= sizeof conns_by_fd / sizeof *conns_by_fd) {
            close(fd);
            continue;
        }
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        c->heap_at = -1;
        conns_by_fd[fd] = c;
        struct epoll_event ev = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0) die("epoll_ctl");
    }
}

static void write_due_events(void) {
    uint64_t now = now_ns();
    while (heap_len && heap[0]->due_ns <= now) {
        struct conn *c = heap[0];
        c->due_ns += period_ns;
        if (c->due_ns < now) c->due_ns = now + period_ns; /* more than a period late: drop the arrears */
        heap_settle(0);
        if (c->out_len - c->out_off > BACKLOG_BYTES_MAX) {
            skipped++;
            continue;
        }
        now = now_ns();
        CHUNK(c, event_delta, now / 1000);
        if (!c->watching_out) conn_flush(c);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die("bind");
    if (listen(fd, 4096) < 0) die("listen");
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 3 || strcmp(argv[1], "--port")) {
        fprintf(stderr, "usage: upstream --port N\n");
        return 2;
    }
    make_message_answer();
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* never outlives the measurement that started it */
    int listener = listen_on(atoi(argv[2]));
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = listener};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &ev) < 0) die("epoll_ctl");

    struct epoll_event events[EPOLL_BATCH];
    for (;;) {
        struct timespec wait = {0}, *timeout = NULL;
        if (heap_len) {
            uint64_t now = now_ns();
            uint64_t wait_ns = heap[0]->due_ns > now ? heap[0]->due_ns - now : 0;
            wait.tv_sec = (time_t)(wait_ns / 1000000000u);
            wait.tv_nsec = (long)(wait_ns % 1000000000u);
            timeout = &wait;
        }
        int n = epoll_pwait2(epoll_fd, events, EPOLL_BATCH, timeout, NULL);
        if (n < 0 && errno != EINTR) die("epoll_pwait2");
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == listener) {
                accept_all(listener);
                continue;
            }
            /* An earlier event of this batch may have closed it (a new pace closes every stream). */
            struct conn *c = conns_by_fd[events[i].data.fd];
            if (!c) continue;
            if (events[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) {
                conn_close(c);
                continue;
            }
            if ((events[i].events & EPOLLOUT) && !conn_flush(c)) continue;
            if (events[i].events & EPOLLIN) conn_read(c);
        }
        write_due_events();
    }
}
