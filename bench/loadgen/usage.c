/* usage.c - clocks, and what a process tree has used, as the kernel's /proc tells it. */
#define _GNU_SOURCE
#include "loadgen.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PROCESSES = 8192 };

struct process {
    int pid, parent;
    double system, ended_children;  /* seconds */
    double rss_kb;
    bool wanted;
};

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void die(const char *what)
{
    fprintf(stderr, "loadgen: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* proc(5): the command name may hold blanks and parentheses, so fields are counted from the last ')'. */
static bool read_process(int pid, struct process *p)
{
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    bool got = fgets(line, sizeof line, file) != NULL;
    fclose(file);
    char *after_name = got ? strrchr(line, ')') : NULL;
    if (!after_name)
        return false;
    unsigned long system;
    long child_user, child_system, rss_pages;
    if (sscanf(after_name + 2, "%*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %lu %ld %ld %*d %*d %*d %*d %*u %*u %ld",
               &p->parent, &system, &child_user, &child_system, &rss_pages) != 5)
        return false;
    double tick = (double)sysconf(_SC_CLK_TCK);
    p->pid = pid;
    p->system = (double)system / tick;
    p->ended_children = (double)(child_user + child_system) / tick;
    p->rss_kb = (double)rss_pages * (double)sysconf(_SC_PAGESIZE) / 1024;
    p->wanted = false;
    return true;
}

static int read_processes(struct process *list)
{
    DIR *proc = opendir("/proc");
    if (!proc)
        die("/proc");
    int count = 0;
    for (struct dirent *entry; (entry = readdir(proc)) && count < MAX_PROCESSES;)
        if (isdigit((unsigned char)entry->d_name[0]) && read_process(atoi(entry->d_name), &list[count]))
            count++;
    closedir(proc);
    return count;
}

/* Nanoseconds of one process with all its threads; /proc/PID/stat alone would be as coarse as 10 ms. */
static double process_cpu(int pid)
{
    clockid_t clock;
    struct timespec t;
    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &t))
        return 0;
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Proportional set size: a page shared by n processes counts 1/n. Zero when we may not look. */
static double process_pss_kb(int pid)
{
    char path[64], line[256];
    double kb = 0;
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "Pss: %lf", &kb) == 1)
            break;
    fclose(file);
    return kb;
}

static void mark_descendants(struct process *list, int count)
{
    for (bool changed = true; changed;) {
        changed = false;
        for (int i = 0; i < count; i++)
            for (int j = 0; j < count && !list[i].wanted; j++)
                if (list[j].wanted && list[j].pid == list[i].parent)
                    list[i].wanted = changed = true;
    }
}

struct usage tree_usage(const int *roots, int count, bool with_memory)
{
    static struct process list[MAX_PROCESSES];
    struct usage sum = {0};
    if (!count)
        return sum;
    int known = read_processes(list);
    for (int i = 0; i < known; i++)
        for (int k = 0; k < count; k++)
            list[i].wanted |= list[i].pid == roots[k];
    mark_descendants(list, known);
    for (int i = 0; i < known; i++) {
        if (!list[i].wanted)
            continue;
        sum.processes++;
        sum.cpu += process_cpu(list[i].pid) + list[i].ended_children;
        sum.system += list[i].system;
        sum.rss_kb += list[i].rss_kb;
        if (with_memory)
            sum.pss_kb += process_pss_kb(list[i].pid);
    }
    if (with_memory && sum.pss_kb == 0)
        sum.pss_kb = sum.rss_kb;
    return sum;
}

double machine_cpu(void)
{
    double user, nice, system, idle, iowait, irq, softirq;
    FILE *file = fopen("/proc/stat", "r");
    if (!file)
        return 0;
    int got = fscanf(file, "cpu %lf %lf %lf %lf %lf %lf %lf", &user, &nice, &system, &idle, &iowait, &irq, &softirq);
    fclose(file);
    return got == 7 ? (user + nice + system + irq + softirq) / (double)sysconf(_SC_CLK_TCK) : 0;
}

double slab_kb(void)
{
    char line[256];
    double kb = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "Slab: %lf", &kb) == 1)
            break;
    fclose(file);
    return kb;
}
