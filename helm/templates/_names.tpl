{{/* Names and labels. */}}

{{- define "m3serve.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: the operator appends its own parts, and names of services end at 63. */}}
{{- define "m3serve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "m3serve.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The service that the operator makes for HTTP. */}}
{{- define "m3serve.serveService" -}}
{{- printf "%s-serve-svc" (include "m3serve.fullname" .) -}}
{{- end -}}

{{- define "m3serve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "m3serve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of pods: nothing that changes with the chart's version, since a changed pod is a new Ray cluster. */}}
{{- define "m3serve.podLabels" -}}
{{ include "m3serve.selectorLabels" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "m3serve.labels" -}}
{{ include "m3serve.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "m3serve.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- if .Values.image.digest -}}
{{- printf "%s:%s@%s" .Values.image.repository $tag .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "m3serve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "m3serve.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Name in the API. */}}
{{- define "m3serve.modelName" -}}
{{- .Values.model.name | default (base .Values.model.path) -}}
{{- end -}}

{{/* What ends streams, in seconds and in the order in which it must happen. Each has time to take effect. */}}
{{- define "m3serve.drain" -}}
{{- $longest := int .Values.drain.longestGenerationSeconds -}}
replicaShutdown: {{ add $longest 30 }}
haproxyHardStop: {{ add $longest 60 }}
rayDrain: {{ add $longest 90 }}
podTermination: {{ add $longest 120 }}
clusterDeletion: {{ add $longest 120 }}
{{- end -}}
