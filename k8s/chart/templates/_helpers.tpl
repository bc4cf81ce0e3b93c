{{/* The release's name, short enough for what KubeRay derives from it. */}}
{{- define "shoal.name" -}}
{{- $name := ternary .Release.Name (printf "%s-shoal" .Release.Name) (contains "shoal" .Release.Name) -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}{{ fail (printf "the release's name gives %s, and the names that KubeRay makes of it begin with a letter and have letters, digits and '-' alone: choose another" $name) }}{{ end -}}
{{- if gt (len $name) 47 }}{{ fail (printf "the release's name gives %s, and KubeRay takes 47 characters: choose a shorter one" $name) }}{{ end -}}
{{- $name -}}
{{- end -}}

{{/* Labels of a pod. Takes a dict: root, component. Not app.kubernetes.io/name, by which KubeRay selects pods. */}}
{{- define "shoal.selector" -}}
shoal/release: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* What selects the pods of Ray: the release's, or, of the kind Jobs, those of all jobs in the namespace. */}}
{{- define "shoal.raySelector" -}}
{{- if eq .Values.kind "Jobs" -}}
matchExpressions:
  - key: shoal/kind
    operator: Exists
{{- else -}}
matchLabels:
  {{- include "shoal.selector" (dict "root" . "component" "ray") | nindent 2 }}
{{- end -}}
{{- end -}}

{{- define "shoal.labels" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Name and labels of an object. Takes a dict: root, and what comes behind the release's name. */}}
{{- define "shoal.metadata" -}}
name: {{ printf "%s%s" (include "shoal.name" .root) (.suffix | default "") | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "shoal.labels" .root | nindent 2 }}
{{- end -}}

{{- define "shoal.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "shoal.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
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

{{/* The Secret with the certificate of nginx. */}}
{{- define "shoal.tlsSecret" -}}
{{- if not (or .Values.tls.secret .Values.tls.issuer.name) }}{{ fail "tls.enabled is set without a certificate: name tls.secret, or tls.issuer.name for cert-manager to make one" }}{{ end -}}
{{ .Values.tls.secret | default (printf "%s-tls" (include "shoal.name" .)) }}
{{- end -}}

{{/* The Secret with the certificate authority of Ray. */}}
{{- define "shoal.rayAuthority" -}}
{{- if not (or .Values.rayTls.secret .Values.rayTls.certManager) }}{{ fail "rayTls.enabled is set without a certificate authority: name rayTls.secret, or set rayTls.certManager" }}{{ end -}}
{{ .Values.rayTls.secret | default (printf "%s-ray-ca" (include "shoal.name" .)) }}
{{- end -}}

{{- define "shoal.budgetVersion" -}}
{{ ternary "policy/v1" "policy/v1beta1" (.Capabilities.APIVersions.Has "policy/v1") }}
{{- end -}}
