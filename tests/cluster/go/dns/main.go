// Command dns is CoreDNS with the four plugins that the test cluster uses. The stock one carries the clients of every
// cloud: twice the packages to compile, for plugins that no test asks.
package main

import (
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/template"
)

func main() {
	coremain.Run()
}
