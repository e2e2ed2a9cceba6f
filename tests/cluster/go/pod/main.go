// Command pod is the one program in the test cluster's own image: the pause process of every sandbox, and a web
// server and client for tests of Services and DNS.
//
//	pod             sleep until SIGTERM or SIGINT
//	pod serve ADDR  answer every request with the host's name
//	pod get URL     print the answer
package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 1:
		pause()
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "get":
		err = get(os.Args[2])
	default:
		err = fmt.Errorf("usage: pod [serve ADDR | get URL]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func pause() {
	// Children of the pod's other processes end up here when the process namespace is shared.
	signal.Ignore(syscall.SIGCHLD)
	ended, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	<-ended.Done()
}

func serve(address string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	go func() {
		pause()
		os.Exit(0)
	}()
	return http.ListenAndServe(address, http.HandlerFunc(func(answer http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(answer, name)
	}))
}

func get(url string) error {
	client := http.Client{Timeout: 5 * time.Second}
	answer, err := client.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
