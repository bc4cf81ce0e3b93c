// Judges manifests as KubeRay's operator does: a JSON manifest a line in, its refusal as a JSON text out ("" for none).
//
// To build it, put this file into a checkout of KubeRay as ray-operator/cmd/validate/main.go and say there
// `go build -o validate ./cmd/validate`; then KUBERAY_VALIDATE=/path/to/validate makes the tests ask it.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	rayv1 "github.com/ray-project/kuberay/ray-operator/apis/ray/v1"
	"github.com/ray-project/kuberay/ray-operator/controllers/ray/utils"
)

func judge(line []byte) (refusal string) {
	defer func() {
		if cause := recover(); cause != nil {
			refusal = fmt.Sprintf("panic: %v", cause)
		}
	}()
	var errs []error
	var job rayv1.RayJob
	var service rayv1.RayService
	if err := json.Unmarshal(line, &job); err != nil {
		errs = append(errs, err)
	} else if job.Kind == "RayJob" {
		errs = append(errs, utils.ValidateRayJobMetadata(job.ObjectMeta), utils.ValidateRayJobSpec(&job))
	} else if err := json.Unmarshal(line, &service); err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, utils.ValidateRayServiceMetadata(service.ObjectMeta), utils.ValidateRayServiceSpec(&service))
	}
	for _, err := range errs {
		if err != nil {
			return err.Error()
		}
	}
	return ""
}

func main() {
	lines := bufio.NewReaderSize(os.Stdin, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 1 {
			refusal, _ := json.Marshal(judge(line))
			fmt.Println(string(refusal))
		}
		if err != nil {
			return
		}
	}
}
