{{/* A pod of Ray. Takes a dict: root, container (its name), cpus, memory, shm, gpus, ports, probes, rdma. */}}
{{- define "shoal.pod" -}}
{{- $ := .root -}}
{{- $amounts := dict "cpu" (.cpus | toString) "memory" .memory -}}
{{- if .gpus }}{{ $_ := set $amounts "nvidia.com/gpu" .gpus }}{{ end -}}
{{- $security := deepCopy $.Values.securityContext -}}
{{- $annotations := deepCopy $.Values.podAnnotations -}}
{{- if and .rdma $.Values.rdma.resource -}}
{{- $_ := set $amounts $.Values.rdma.resource $.Values.rdma.count -}}
{{- $capabilities := $security.capabilities | default dict -}}
{{- $_ := set $security "capabilities" (merge (dict "add" (append ($capabilities.add | default list) "IPC_LOCK" | uniq)) $capabilities) -}}
{{- with $.Values.rdma.networks }}{{ $_ := set $annotations "k8s.v1.cni.cncf.io/networks" . }}{{ end -}}
{{- end -}}
metadata:
  labels:
    {{- include "shoal.selector" (dict "root" $ "component" "ray") | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "shoal.serviceAccount" $ | quote }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $.Values.terminationGracePeriodSeconds }}
  {{- include "shoal.pullSecrets" $ | nindent 2 }}
  {{- with $.Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $.Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $.Values.podSecurityContext | nindent 4 }}
  {{- if $.Values.rayTls.enabled }}
  initContainers:
    {{- include "shoal.certificate" $ | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "shoal.image" $ | quote }}
      imagePullPolicy: {{ $.Values.image.pullPolicy | quote }}
      securityContext:
        {{- toYaml $security | nindent 8 }}
      resources:
        requests:
          {{- toYaml $amounts | nindent 10 }}
        limits:
          {{- toYaml $amounts | nindent 10 }}
      env:
        - name: HOME
          value: /tmp
        {{- if $.Values.rayTls.enabled }}
        - name: RAY_USE_TLS
          value: "1"
        {{- range $variable, $file := dict "RAY_TLS_SERVER_CERT" "tls.crt" "RAY_TLS_SERVER_KEY" "tls.key" "RAY_TLS_CA_CERT" "ca.crt" }}
        - name: {{ $variable }}
          value: /etc/ray/tls/{{ $file }}
        {{- end }}
        {{- end }}
        {{- with include "shoal.tokenSecret" $ }}
        - name: SHOAL_API_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ . | quote }}
              key: token
        {{- end }}
        {{- with $.Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- toYaml .ports | nindent 8 }}
      {{- with .probes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- if and (eq $.Values.kind "RayService") $.Values.service.drainSeconds }}
      {{- if le (int $.Values.terminationGracePeriodSeconds) (int $.Values.service.drainSeconds) }}{{ fail (printf "terminationGracePeriodSeconds is %d, and service.drainSeconds %d: give pods more time than requests have" (int $.Values.terminationGracePeriodSeconds) (int $.Values.service.drainSeconds)) }}{{ end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $.Values.service.drainSeconds | toString | quote }}]
      {{- end }}
      volumeMounts:
        - name: runs
          mountPath: {{ $.Values.storage.mountPath | quote }}
          readOnly: {{ $.Values.storage.readOnly }}
        - name: shm
          mountPath: /dev/shm
        - name: tmp
          mountPath: /tmp
        {{- if $.Values.rayTls.enabled }}
        - name: ray-tls
          mountPath: /etc/ray/tls
          readOnly: true
        {{- end }}
  volumes:
    - name: runs
      persistentVolumeClaim:
        claimName: {{ $.Values.storage.claim | quote }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .shm | quote }}
    - name: tmp
      emptyDir: {}
    {{- if $.Values.rayTls.enabled }}
    - name: ray-tls
      emptyDir:
        medium: Memory
    - name: ray-authority
      secret:
        secretName: {{ include "shoal.rayAuthority" $ | quote }}
    {{- end }}
{{- end -}}

{{/* Makes the pod's certificate. Ray's processes know each other by address, so no certificate made beforehand would
do; workers know the head by the name of its Service as well. The authority's key is seen by this container alone. */}}
{{- define "shoal.certificate" -}}
- name: certificate
  image: {{ include "shoal.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 64Mi}
    limits: {cpu: 500m, memory: 128Mi}
  env:
    - name: POD_IP
      valueFrom:
        fieldRef:
          fieldPath: status.podIP
    - name: NAMES
      value: {{ printf "DNS:localhost,DNS:*.%s.svc.%s" .Release.Namespace .Values.rayTls.clusterDomain | quote }}
    - name: AUTHORITY
      value: /etc/ray/authority
    - name: OUT
      value: /etc/ray/tls
  command: [sh, -ceu]
  args:
    - |
      umask 077
      cp "$AUTHORITY/tls.crt" "$OUT/ca.crt"
      openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$POD_IP" \
        -keyout "$OUT/tls.key" -out "$OUT/tls.csr"
      echo "subjectAltName=IP:$POD_IP,IP:127.0.0.1,$NAMES" > "$OUT/names"
      openssl x509 -req -in "$OUT/tls.csr" -CA "$AUTHORITY/tls.crt" -CAkey "$AUTHORITY/tls.key" \
        -set_serial "0x$(openssl rand -hex 16)" -days 3650 -extfile "$OUT/names" -out "$OUT/tls.crt"
  volumeMounts:
    - name: ray-authority
      mountPath: /etc/ray/authority
      readOnly: true
    - name: ray-tls
      mountPath: /etc/ray/tls
{{- end -}}

{{/* What a RayCluster and a RayService have in common. */}}
{{- define "shoal.cluster" -}}
{{- $metrics := dict "name" "metrics" "containerPort" 8080 -}}
{{- $ports := list (dict "name" "gcs-server" "containerPort" 6379) (dict "name" "dashboard" "containerPort" 8265) (dict "name" "client" "containerPort" 10001) $metrics -}}
{{- if eq .Values.kind "RayService" }}{{ $ports = concat $ports (list (dict "name" "serve" "containerPort" 8000) (dict "name" "grpc" "containerPort" 9000)) }}{{ end -}}
rayVersion: {{ .Values.rayVersion | quote }}
{{- if .Values.rayTokenAuth }}
{{- if semverCompare "<2.52.0" .Values.rayVersion }}{{ fail (printf "rayTokenAuth is set, and rayVersion %s has no token authentication: use 2.52.0 or later, or set rayTokenAuth to false" .Values.rayVersion) }}{{ end }}
authOptions:
  mode: token
{{- end }}
headGroupSpec:
  rayStartParams:
    dashboard-host: 0.0.0.0
    num-cpus: "0"
    object-store-memory: "536870912"
  template:
    {{- include "shoal.pod" (dict "root" . "container" "ray-head" "cpus" .Values.head.cpus "memory" .Values.head.memory "shm" .Values.head.shm "gpus" 0 "ports" $ports "probes" .Values.probes.head "rdma" false) | nindent 4 }}
workerGroupSpecs:
  - groupName: ranks
    replicas: {{ .Values.workers.replicas }}
    minReplicas: {{ .Values.workers.replicas }}
    maxReplicas: {{ .Values.workers.replicas }}
    rayStartParams:
      num-cpus: {{ .Values.workers.cpus | toString | quote }}
      object-store-memory: "536870912"
    template:
      {{- include "shoal.pod" (dict "root" . "container" "ray-worker" "cpus" .Values.workers.cpus "memory" .Values.workers.memory "shm" .Values.workers.shm "gpus" .Values.workers.gpus "ports" (list $metrics) "probes" .Values.probes.worker "rdma" true) | nindent 6 }}
{{- end -}}
