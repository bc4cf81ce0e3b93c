{{/* The release's name, short enough for what KubeRay derives from it. */}}
{{- define "shoal.name" -}}
{{- $name := ternary .Release.Name (printf "%s-shoal" .Release.Name) (contains "shoal" .Release.Name) -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}{{ fail (printf "the release's name gives %s, and the names that KubeRay makes of it begin with a letter and have letters, digits and '-' alone: choose another" $name) }}{{ end -}}
{{- if gt (len $name) 47 }}{{ fail (printf "the release's name gives %s, and KubeRay takes 47 characters: choose a shorter one" $name) }}{{ end -}}
{{- $name -}}
{{- end -}}

{{/* Labels of pods. Not app.kubernetes.io/name, which KubeRay sets on its pods and selects them by. */}}
{{- define "shoal.selector" -}}
shoal/release: {{ .Release.Name | quote }}
{{- end -}}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "shoal.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "shoal.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "shoal.name" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* The Secret with the service's token; empty for none. */}}
{{- define "shoal.tokenSecret" -}}
{{- if eq .Values.kind "RayService" -}}
{{- if .Values.token.existingSecret -}}
{{ .Values.token.existingSecret }}
{{- else if .Values.token.create -}}
{{ include "shoal.name" . }}-token
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A pod template. Takes a dict: root, container (its name), cpus, memory, shm, gpus, ports, probes. */}}
{{- define "shoal.pod" -}}
{{- $ := .root -}}
{{- $amounts := dict "cpu" (.cpus | toString) "memory" .memory -}}
{{- if .gpus }}{{ $_ := set $amounts "nvidia.com/gpu" .gpus }}{{ end -}}
metadata:
  labels:
    {{- include "shoal.selector" $ | nindent 4 }}
spec:
  serviceAccountName: {{ include "shoal.serviceAccount" $ | quote }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $.Values.terminationGracePeriodSeconds }}
  {{- with $.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- with $.Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $.Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $.Values.podSecurityContext | nindent 4 }}
  containers:
    - name: {{ .container }}
      image: {{ include "shoal.image" $ | quote }}
      imagePullPolicy: {{ $.Values.image.pullPolicy | quote }}
      securityContext:
        {{- toYaml $.Values.securityContext | nindent 8 }}
      resources:
        requests:
          {{- toYaml $amounts | nindent 10 }}
        limits:
          {{- toYaml $amounts | nindent 10 }}
      env:
        - name: HOME
          value: /tmp
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
      {{- with .ports }}
      ports:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .probes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      volumeMounts:
        - name: runs
          mountPath: {{ $.Values.storage.mountPath | quote }}
          readOnly: {{ $.Values.storage.readOnly }}
        - name: shm
          mountPath: /dev/shm
        - name: tmp
          mountPath: /tmp
  volumes:
    - name: runs
      persistentVolumeClaim:
        claimName: {{ required "storage.claim is empty: name a PersistentVolumeClaim that all nodes can mount" $.Values.storage.claim | quote }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .shm | quote }}
    - name: tmp
      emptyDir: {}
{{- end -}}

{{/* What a RayCluster and a RayService have in common. */}}
{{- define "shoal.cluster" -}}
{{- $serving := eq .Values.kind "RayService" -}}
{{- $ports := list (dict "name" "gcs-server" "containerPort" 6379) (dict "name" "dashboard" "containerPort" 8265) (dict "name" "client" "containerPort" 10001) (dict "name" "metrics" "containerPort" 8080) -}}
{{- if $serving }}{{ $ports = concat $ports (list (dict "name" "serve" "containerPort" 8000) (dict "name" "grpc" "containerPort" 9000)) }}{{ end -}}
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
    {{- include "shoal.pod" (dict "root" . "container" "ray-head" "cpus" .Values.head.cpus "memory" .Values.head.memory "shm" "1Gi" "gpus" 0 "ports" $ports "probes" .Values.probes.head) | nindent 4 }}
workerGroupSpecs:
  - groupName: ranks
    replicas: {{ .Values.workers.replicas }}
    minReplicas: {{ .Values.workers.replicas }}
    maxReplicas: {{ .Values.workers.replicas }}
    rayStartParams:
      num-cpus: {{ .Values.workers.cpus | toString | quote }}
      object-store-memory: "536870912"
    template:
      {{- include "shoal.pod" (dict "root" . "container" "ray-worker" "cpus" .Values.workers.cpus "memory" .Values.workers.memory "shm" .Values.workers.shm "gpus" .Values.workers.gpus "ports" list "probes" .Values.probes.worker) | nindent 6 }}
{{- end -}}
